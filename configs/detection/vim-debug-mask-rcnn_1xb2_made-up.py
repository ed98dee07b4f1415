"""Ten steps of a small Mask R-CNN on made-up images: does the set-up run?"""

_base_ = ["../_base_/detection_runtime.py", "../_base_/datasets/made_up_boxes.py"]
model = dict(
    type="VimDetector",
    backbone=dict(
        name="vim_tiny_patch16_224_pyramid", img_size=64, embed_dim=32, depth=2, d_state=4
    ),
    channels=16,
    fc_channels=32,
    anchor_sizes=(8, 16, 32, 64, 128),
    proposals=50,
    box_samples=32,
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
