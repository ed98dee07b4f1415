"""Imagenette at 128 px, from tar files: 9,469 training and 3,925 validation images, 10 classes.

Put the files, or links to them, where `root` says, or set it by --cfg-options.
"""

model = dict(
    data_preprocessor=dict(
        type="VimPreprocessor",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        channels_last=True,
        num_classes=10,
        mixup=0.2,
        cutmix=1.0,
        mixup_prob=0.7,
        mixup_switch_prob=0.5,
        mixup_until=0.85,
        label_smoothing=0.1,
    ),
)
train_dataloader = dict(
    dataset=dict(name="", root="data/imagenette128_train.tar", split="train", cache="decoded"),
    batch_size=256,
    num_workers=14,
    input_size=128,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    augmentation=dict(auto_augment="rand-m9-mstd0.5-inc1", scale=(0.3, 1.0)),
)
val_dataloader = dict(
    dataset=dict(name="", root="data/imagenette128_val.tar", split="validation", cache="decoded"),
    batch_size=512,
    num_workers=4,
    input_size=128,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_pct=0.875,
)
test_dataloader = val_dataloader
