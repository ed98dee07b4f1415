"""The official schedule of detection: hustvl/Vim, det/projects/ViTDet/configs, after ViTDet.

AdamW, rate 1e-4, betas (0.9, 0.999), weight decay 0.1, which official Vim leaves out for norms and
position embeddings, timm for biases, too. 184,375 iterations of 64 images are 100 epochs of COCO's
118,000; here 100 epochs of the 117,266 images with objects, 1,832 iterations each. 250 iterations
of warm-up from a thousandth; a tenth of the rate after 163,889 and another after 177,546 of the
184,375, which are 162,845 and 176,415 of these 183,200. Official Vim ran float16 autocast; here it
is bfloat16, in which no loss overflows.
"""

train_cfg = dict(type="VimTrainLoop", max_epochs=100, val_interval=10)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    optimizer=dict(opt="adamw", lr=1e-4, weight_decay=0.1, betas=(0.9, 0.999)),
    dtype="bfloat16",
)
param_scheduler = [
    dict(type="LinearLR", by_epoch=False, start_factor=1e-3, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, milestones=[162845, 176415], gamma=0.1),
]
auto_scale_lr = dict(enable=False, base_batch_size=64)
