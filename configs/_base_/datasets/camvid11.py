"""CamVid, 11 classes, 480 x 360: 367 training, 101 validation and 233 test images, in one tar.

Brostow et al. 2009, in the split of SegNet (arXiv:1511.00561). The tar, or a folder laid out alike,
has images/SPLIT/X.jpg, masks/SPLIT/X.png with 255 for void, and classes.json. Put it, or a link to
it, where `root` says, or set it by --cfg-options. Images are seen whole in evaluation.
"""

model = dict(
    num_classes=11,
    data_preprocessor=dict(
        type="VimSegmentationPreprocessor", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
)
train_dataloader = dict(
    task="segmentation",
    dataset=dict(name="", root="data/camvid11.tar", split="train", num_classes=11),
    batch_size=8,
    num_workers=8,
    crop_size=(352, 480),
    mean=(0.485, 0.456, 0.406),
)
val_dataloader = dict(
    task="segmentation",
    dataset=dict(name="", root="data/camvid11.tar", split="val", num_classes=11),
    batch_size=8,
    num_workers=4,
)
test_dataloader = dict(
    task="segmentation",
    dataset=dict(name="", root="data/camvid11.tar", split="test", num_classes=11),
    batch_size=8,
    num_workers=4,
)
