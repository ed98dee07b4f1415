"""Pre-training of Vim-B, for which the authors published no script.

The recipe of FastVim (Kapse et al. 2025) for Vim-B, 82.6 % top-1: batch 1024, rate
1e-3, weight decay 0.05, drop path 0.4, EMA 0.9999, LayerNorm after the scan. Without that norm
(`norm_after_scan=False`) it is the model of the published weights, 81.9 %.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/official_300e.py",
]
model = dict(
    type="VimClassifier",
    backbone=dict(name="vim_base_patch16_224", drop_path_rate=0.4, norm_after_scan=True),
    loss=dict(kind="soft-target"),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
default_hooks = dict(ema=dict(decay=0.9999, warmup=False))
