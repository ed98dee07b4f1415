"""What every run has: where it writes, what it logs and keeps. Keys: `vim.engine.runner`."""

default_scope = None
default_hooks = dict(
    logger=None,  # said by progress and metrics
    timer=None,
    ema=dict(type="VimEMAHook", decay=0.9999, warmup=True),
    checkpoint=dict(type="VimCheckpointHook", keep=3, save_best="top1"),
    finite=dict(type="VimFiniteHook"),
    progress=dict(type="VimProgressHook", interval=50),
    metrics=dict(type="VimMetricsHook", interval=50),
    curves=dict(type="VimCurvesHook"),
    run_info=dict(type="VimRunInfoHook"),
)
randomness = dict(seed=0)
val_cfg = dict(type="VimValLoop", dtype="bfloat16")
test_cfg = dict(type="VimTestLoop", dtype="bfloat16")
val_evaluator = dict(type="VimClassificationMetric")
test_evaluator = dict(type="VimClassificationMetric")
