"""What every run of a detector has; see default_runtime.py."""

_base_ = ["./default_runtime.py"]
default_hooks = dict(checkpoint=dict(save_best="box_AP"))
val_evaluator = dict(type="VimDetectionMetric")
test_evaluator = dict(type="VimDetectionMetric")
