"""Vim-micro from scratch on Imagenette at 128 px: the model that is shipped with its weights."""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/imagenette128.py",
    "../_base_/schedules/imagenette_400e.py",
]
model = dict(
    type="VimClassifier",
    backbone=dict(name="vim_micro_patch8_128", num_classes=10, drop_path_rate=0.1),
    loss=dict(kind="soft-target"),
    cuda_graph=True,
)
default_hooks = dict(
    ema=dict(decay=0.999, warmup=True),
    # An iteration takes some 30 ms, and looking at the loss waits for the device.
    finite=dict(interval=50),
)
