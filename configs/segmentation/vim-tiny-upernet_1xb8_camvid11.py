"""UPerNet on Vim-Ti for CamVid's 11 classes, some 9,000 iterations.

Head and loss are the official ones for ADE20K; rate, epochs and averaging are a starting point for
so small a data set, not tuned. Set model.backbone.checkpoint to pre-trained weights (--checkpoint).
"""

_base_ = ["../_base_/segmentation_runtime.py", "../_base_/datasets/camvid11.py"]
model = dict(
    type="VimSegmenter",
    backbone=dict(name="vim_tiny_patch16_224_pyramid", drop_path_rate=0.1, checkpoint=None),
    channels=192,
    auxiliary_weight=0.4,
)
train_cfg = dict(type="VimTrainLoop", max_epochs=200, val_interval=10)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    optimizer=dict(opt="adamw", lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    dtype="bfloat16",
)
param_scheduler = dict(
    type="VimCosineLR", by_epoch=True, total=200, warmup=10, warmup_lr=1e-6, min_lr=1e-6
)
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(ema=dict(decay=0.999, warmup=True))
