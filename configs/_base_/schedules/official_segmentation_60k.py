"""The official schedule of segmentation: hustvl/Vim, seg/configs.

AdamW, betas (0.9, 0.999), 60,000 iterations of 32 images, 1,500 of them warm-up, then a straight
line to 0. Here it is 95 epochs of ADE20K, of 631 iterations: 59,945. Officially float32 throughout;
here bf16 autocast with float32 weights; `optim_wrapper.dtype=float32` is the official way.
"""

train_cfg = dict(type="VimTrainLoop", max_epochs=95, val_interval=10)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    optimizer=dict(opt="adamw", betas=(0.9, 0.999)),
    dtype="bfloat16",
)
param_scheduler = [
    dict(type="LinearLR", by_epoch=False, start_factor=1e-6, begin=0, end=1500),
    dict(type="PolyLR", by_epoch=False, power=1.0, eta_min=0.0, begin=1500, end=59945),
]
auto_scale_lr = dict(enable=False, base_batch_size=32)
