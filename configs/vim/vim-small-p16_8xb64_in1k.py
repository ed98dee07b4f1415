"""Official pre-training of Vim-S: 80.5 % top-1. Source: hustvl/Vim, vim/scripts/pt-vim-s.sh."""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/official_300e.py",
]
model = dict(
    type="VimClassifier",
    backbone=dict(name="vim_small_patch16_224", drop_path_rate=0.05),
    loss=dict(kind="soft-target"),
)
train_dataloader = dict(batch_size=64)
# --lr 1e-3 times 512 images a step over 512
optim_wrapper = dict(optimizer=dict(lr=1e-3 * 512 / 512, weight_decay=0.05))
auto_scale_lr = dict(base_batch_size=512)
default_hooks = dict(ema=dict(decay=0.99996, warmup=False))
