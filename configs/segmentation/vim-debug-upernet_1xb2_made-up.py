"""Ten steps of a small segmenter on made-up images and masks: does the set-up run?"""

_base_ = ["../_base_/segmentation_runtime.py", "../_base_/datasets/made_up_masks.py"]
model = dict(
    type="VimSegmenter",
    backbone=dict(
        name="vim_tiny_patch16_224_pyramid", img_size=64, embed_dim=32, depth=4, d_state=4
    ),
    channels=16,
    auxiliary_channels=16,
)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    optimizer=dict(opt="adamw", lr=1e-3, weight_decay=0.05),
    dtype="float32",
)
train_cfg = dict(type="VimTrainLoop", max_epochs=1, checkpoint_interval=5)
param_scheduler = dict(type="VimCosineLR", by_epoch=True, total=2, warmup=1)
val_cfg = dict(dtype="float32")
test_cfg = dict(dtype="float32")
default_hooks = dict(progress=dict(interval=1), metrics=dict(interval=1))
