"""ImageNet-1k as folders of classes, with the augmentation of the official recipe.

The recipe's figures: hustvl/Vim, vim/main.py (defaults) and vim/scripts/pt-vim-t.sh.
"""

model = dict(
    data_preprocessor=dict(
        type="VimPreprocessor",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        num_classes=1000,
        # Of the official recipe: DeiT's, arXiv:2012.12877, table 9.
        mixup=0.8,
        cutmix=1.0,
        mixup_prob=1.0,
        mixup_switch_prob=0.5,
        label_smoothing=0.1,
        re_prob=0.25,
        re_mode="pixel",
    ),
)
train_dataloader = dict(
    dataset=dict(name="", root="data/imagenet/train", split="train"),
    batch_size=128,
    num_workers=10,
    input_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    repeats=3,  # repeated augmentation
    augmentation=dict(
        auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3, interpolation="bicubic"
    ),
)
val_dataloader = dict(
    dataset=dict(name="", root="data/imagenet/val", split="validation"),
    batch_size=128,
    num_workers=10,
    input_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_pct=0.875,
)
test_dataloader = val_dataloader
