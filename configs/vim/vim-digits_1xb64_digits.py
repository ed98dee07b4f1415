"""A Vim of three blocks on scikit-learn's digits: two minutes on a CPU, no files."""

_base_ = ["../_base_/default_runtime.py", "../_base_/datasets/digits.py"]
model = dict(
    type="VimClassifier",
    backbone=dict(
        name="vim_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        embed_dim=48,
        depth=3,
        d_state=8,
        num_classes=10,
        global_pool="avg",
    ),
    loss=dict(kind="soft-target"),
)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    optimizer=dict(opt="adamw", lr=6e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    dtype="float32",
)
train_cfg = dict(type="VimTrainLoop", max_epochs=20, val_interval=1)
param_scheduler = dict(type="VimCosineLR", by_epoch=True, total=20, warmup=2, warmup_lr=1e-5)
val_cfg = dict(dtype="float32")
test_cfg = dict(dtype="float32")
default_hooks = dict(ema=dict(decay=0.99))
