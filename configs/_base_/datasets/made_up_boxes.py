"""Random images with boxes and masks made on the fly, to try a set-up without any data."""

model = dict(
    num_classes=3,
    data_preprocessor=dict(
        type="VimDetectionPreprocessor", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    ),
    inference=dict(short_side=64, long_side=128),
)
train_dataloader = dict(
    task="detection",
    dataset=dict(name="made-up", num_samples=20, num_classes=3, img_size=64, masks=True),
    batch_size=2,
    num_workers=0,
    crop_size=(64, 64),
    mean=(0.5, 0.5, 0.5),
)
val_dataloader = dict(
    task="detection",
    dataset=dict(name="made-up", num_samples=4, num_classes=3, img_size=64, masks=True),
    batch_size=2,
    num_workers=0,
)
test_dataloader = val_dataloader
