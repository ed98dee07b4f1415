"""Official pre-training of Vim-Ti: 76.1 % top-1. Source: hustvl/Vim, vim/scripts/pt-vim-t.sh."""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/official_300e.py",
]
model = dict(
    type="VimClassifier",
    backbone=dict(name="vim_tiny_patch16_224"),
    loss=dict(kind="soft-target"),
)
default_hooks = dict(ema=dict(decay=0.99996, warmup=False))
