"""Mask R-CNN on Vim-Ti that learns COCO128 by heart: does the whole path of boxes and masks work?

The aim is a box AP of 80 or more on the images that it is trained on. Nothing regularises: no drop
path, no weight decay to speak of, images as they are.
"""

_base_ = ["../_base_/detection_runtime.py", "../_base_/datasets/coco128.py"]
model = dict(
    type="VimDetector",
    backbone=dict(name="vim_tiny_patch16_224_pyramid", img_size=640, checkpoint=None),
    channels=128,
    fc_channels=512,
    proposals=500,
    box_samples=512,
)
train_cfg = dict(type="VimTrainLoop", max_epochs=300, val_interval=50)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    optimizer=dict(opt="adamw", lr=5e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0),
    dtype="bfloat16",
)
param_scheduler = dict(
    type="VimCosineLR", by_epoch=True, total=300, warmup=5, warmup_lr=1e-6, min_lr=1e-6
)
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(ema=dict(decay=0.998, warmup=True))
