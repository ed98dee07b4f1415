"""Random images made on the fly, to try a set-up without any data."""

model = dict(
    data_preprocessor=dict(
        type="VimPreprocessor",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        num_classes=10,
        mixup=0.8,
        label_smoothing=0.1,
        re_prob=0.25,
    ),
)
train_dataloader = dict(
    dataset=dict(name="made-up", num_samples=40, num_classes=10, img_size=32),
    batch_size=4,
    num_workers=0,
    input_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    augmentation=dict(auto_augment="rand-m9-mstd0.5-inc1"),
)
val_dataloader = dict(
    dataset=dict(name="made-up", num_samples=20, num_classes=10, img_size=32),
    batch_size=4,
    num_workers=0,
    input_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    crop_pct=1.0,
)
test_dataloader = val_dataloader
