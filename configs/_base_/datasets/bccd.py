"""BCCD, blood cells of three classes, boxes alone: 205 training, 87 validation and 72 test images.

https://github.com/Shenggan/BCCD_Dataset (MIT), converted to COCO's format: a folder or an
uncompressed tar with images/X.jpg of 640 x 480 pixels, train.json, val.json and test.json. Put it,
or a link to it, where `root` says, or set it by --cfg-options. The jitter is narrow, since all
photographs are of one magnification.
"""

model = dict(
    num_classes=3,
    masks=False,
    data_preprocessor=dict(
        type="VimDetectionPreprocessor", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    inference=dict(short_side=480, long_side=640),
)
train_dataloader = dict(
    task="detection",
    dataset=dict(name="", root="data/bccd_coco.tar", annotations="train.json", num_classes=3),
    batch_size=8,
    num_workers=8,
    crop_size=(448, 576),
    augmentation=dict(scale=(0.8, 1.5), photometric=0.5),
    mean=(0.485, 0.456, 0.406),
)
val_dataloader = dict(
    task="detection",
    dataset=dict(name="", root="data/bccd_coco.tar", annotations="val.json", num_classes=3),
    batch_size=8,
    num_workers=4,
)
test_dataloader = dict(
    task="detection",
    dataset=dict(name="", root="data/bccd_coco.tar", annotations="test.json", num_classes=3),
    batch_size=8,
    num_workers=4,
)
