"""COCO 2017, boxes and masks of 80 classes: 118,287 training and 5,000 validation images.

Lin et al. 2014, arXiv:1405.0312. `root` has the folders train2017, val2017 and annotations as
https://cocodataset.org/#download has them. Large-scale jitter to 1024 x 1024 pixels, scales of 0.1
to 2; images without objects are left out in training. Source: hustvl/Vim, det/projects/ViTDet and
det/configs/common/coco_loader_lsj.py.
"""

model = dict(
    num_classes=80,
    data_preprocessor=dict(
        type="VimDetectionPreprocessor", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    inference=dict(short_side=1024, long_side=1024, canvas=(1024, 1024)),
)
train_dataloader = dict(
    task="detection",
    dataset=dict(
        name="",
        root="data/coco",
        annotations="annotations/instances_train2017.json",
        images="train2017",
        num_classes=80,
        masks=True,
        keep_empty=False,
    ),
    batch_size=8,
    num_workers=8,
    crop_size=(1024, 1024),
    augmentation=dict(scale=(0.1, 2.0)),
    mean=(0.485, 0.456, 0.406),
)
val_dataloader = dict(
    task="detection",
    dataset=dict(
        name="",
        root="data/coco",
        annotations="annotations/instances_val2017.json",
        images="val2017",
        num_classes=80,
        masks=True,
        on_fault="repair",
    ),
    batch_size=1,
    num_workers=4,
)
test_dataloader = val_dataloader
