"""Your own images: a folder a class under data/train and data/val; see docs/training.md."""

model = dict(
    data_preprocessor=dict(
        type="VimPreprocessor",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        num_classes=10,
        mixup=0.2,
        cutmix=1.0,
        mixup_prob=0.5,
        label_smoothing=0.1,
        re_prob=0.1,
    ),
)
train_dataloader = dict(
    dataset=dict(name="", root="data/train", split="train", on_corrupt="skip"),
    batch_size=64,
    num_workers=8,
    input_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    augmentation=dict(auto_augment="rand-m6-mstd0.5-inc1", scale=(0.35, 1.0)),
)
val_dataloader = dict(
    dataset=dict(name="", root="data/val", split="validation"),
    batch_size=64,
    num_workers=8,
    input_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_pct=0.95,
)
test_dataloader = val_dataloader
