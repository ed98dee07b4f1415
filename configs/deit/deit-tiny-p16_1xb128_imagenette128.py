"""timm's DeiT-Ti by the recipe of Vim-Ti on Imagenette, for comparison."""

_base_ = ["../_base_/default_runtime.py", "../_base_/datasets/imagenette128.py"]
model = dict(
    type="VimClassifier",
    backbone=dict(
        name="deit_tiny_patch16_224", img_size=128, patch_size=8, num_classes=10, drop_path_rate=0.1
    ),
    loss=dict(kind="soft-target"),
)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    optimizer=dict(opt="adamw", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    dtype="bfloat16",
)
train_cfg = dict(type="VimTrainLoop", max_epochs=200, val_interval=5)
param_scheduler = dict(
    type="VimCosineLR", by_epoch=True, total=200, warmup=10, warmup_lr=1e-6, min_lr=1e-5
)
auto_scale_lr = dict(enable=False, base_batch_size=128)
default_hooks = dict(ema=dict(decay=0.9998, warmup=True))
