"""ADE20K for scene parsing: 150 classes, 20,210 training and 2,000 validation images.

ADEChallengeData2016 as its authors publish it: images and annotations, 0 for void. Crops, scales
and colours are those of the official recipe: hustvl/Vim, seg/configs, and mmsegmentation's
configs/_base_/datasets/ade20k.py, on which it builds. Evaluation shows images with a shorter side
of 512 in windows, and compares with masks of the original size.
"""

model = dict(
    num_classes=150,
    data_preprocessor=dict(
        type="VimSegmentationPreprocessor", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    inference=dict(window=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(
    task="segmentation",
    dataset=dict(
        name="",
        root="data/ADEChallengeData2016",
        layout="ade20k",
        split="training",
        num_classes=150,
    ),
    batch_size=8,
    num_workers=8,
    crop_size=(512, 512),
    short_side=512,
    augmentation=dict(scale=(0.5, 2.0), max_class_share=0.75, hflip=0.5, photometric=0.5),
    mean=(0.485, 0.456, 0.406),
)
val_dataloader = dict(
    task="segmentation",
    dataset=dict(
        name="",
        root="data/ADEChallengeData2016",
        layout="ade20k",
        split="validation",
        num_classes=150,
    ),
    batch_size=1,
    num_workers=4,
    short_side=512,
)
test_dataloader = val_dataloader
