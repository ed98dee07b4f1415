"""Random images with masks made on the fly, to try a set-up without any data."""

model = dict(
    num_classes=4,
    data_preprocessor=dict(
        type="VimSegmentationPreprocessor", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    ),
)
train_dataloader = dict(
    task="segmentation",
    dataset=dict(name="made-up", num_samples=20, num_classes=4, img_size=64),
    batch_size=2,
    num_workers=0,
    crop_size=(48, 64),
    mean=(0.5, 0.5, 0.5),
)
val_dataloader = dict(
    task="segmentation",
    dataset=dict(name="made-up", num_samples=4, num_classes=4, img_size=64),
    batch_size=2,
    num_workers=0,
)
test_dataloader = val_dataloader
