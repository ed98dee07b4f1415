"""COCO128, the first 128 images of COCO with a polygon an object: trained and tested on the same.

A check that boxes and masks can be learnt, not a benchmark: there is no other split. A folder or an
uncompressed tar with images/X.jpg and instances.json; 71 of the 80 classes occur. Images are seen
as they are, in one size, so that they can be learnt by heart.
"""

model = dict(
    num_classes=80,
    data_preprocessor=dict(
        type="VimDetectionPreprocessor", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    inference=dict(short_side=640, long_side=640, canvas=(640, 640)),
)
train_dataloader = dict(
    task="detection",
    dataset=dict(
        name="",
        root="data/coco128_seg.tar",
        annotations="instances.json",
        num_classes=80,
        masks=True,
    ),
    batch_size=8,
    num_workers=8,
    crop_size=(640, 640),
    augmentation=dict(scale=(1.0, 1.0), hflip=0.0),
    mean=(0.485, 0.456, 0.406),
)
val_dataloader = dict(
    task="detection",
    dataset=dict(
        name="",
        root="data/coco128_seg.tar",
        annotations="instances.json",
        num_classes=80,
        masks=True,
    ),
    batch_size=8,
    num_workers=4,
)
test_dataloader = val_dataloader
