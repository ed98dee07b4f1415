"""scikit-learn's 1,797 scans of handwritten digits, 8 px: no file, no network."""

model = dict(
    data_preprocessor=dict(
        type="VimPreprocessor",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        num_classes=10,
        label_smoothing=0.1,
    ),
)
train_dataloader = dict(
    dataset=dict(name="digits", split="train"),
    batch_size=64,
    num_workers=0,
    input_size=8,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    augmentation=dict(hflip=0.0, scale=(0.8, 1.0), color_jitter=None),
)
val_dataloader = dict(
    dataset=dict(name="digits", split="validation"),
    batch_size=64,
    num_workers=0,
    input_size=8,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    crop_pct=1.0,
)
test_dataloader = val_dataloader
