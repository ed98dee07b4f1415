"""Faster R-CNN on Vim-Ti for the blood cells of BCCD.

Heads of half ViTDet's width; rate, epochs and averaging are a starting point for so small a data
set, not tuned. Set model.backbone.checkpoint to pre-trained weights (--checkpoint).
"""

_base_ = ["../_base_/detection_runtime.py", "../_base_/datasets/bccd.py"]
model = dict(
    type="VimDetector",
    backbone=dict(
        name="vim_tiny_patch16_224_pyramid",
        img_size=(448, 576),
        drop_path_rate=0.1,
        checkpoint=None,
    ),
    channels=128,
    fc_channels=512,
    proposals=500,
    box_samples=256,
)
train_cfg = dict(type="VimTrainLoop", max_epochs=200, val_interval=10)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    optimizer=dict(opt="adamw", lr=3e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    dtype="bfloat16",
)
param_scheduler = dict(
    type="VimCosineLR", by_epoch=True, total=200, warmup=5, warmup_lr=1e-6, min_lr=1e-6
)
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(ema=dict(decay=0.999, warmup=True))
