"""Fine-tune a published Vim-Ti on your own folder of images; see docs/training.md.

Layer decay and rate are those customary for fine-tuning of ViTs (BEiT, arXiv:2106.08254, table 9,
scaled to a batch of 64).
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/folder.py",
    "../_base_/schedules/fine_tune_30e.py",
]
model = dict(
    type="VimClassifier",
    backbone=dict(name="vim_tiny_patch16_224", num_classes=10, drop_path_rate=0.1, checkpoint=None),
    loss=dict(kind="soft-target"),
)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.05, layer_decay=0.75),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = dict(warmup_lr=1e-6, min_lr=1e-6)
auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(ema=dict(decay=0.9998, warmup=True))
