"""Training of small models from scratch on Imagenette: 400 epochs of 36 iterations.

The rate is that of DeiT's small-data descendants (Compact Transformers, arXiv:2104.05704: 5.5e-4 at
a batch of 128), a little higher; clipping lets it stand. `train_cfg.max_seconds` gives models of
different speed the same time instead of as many epochs.
"""

train_cfg = dict(type="VimTrainLoop", max_epochs=400, val_interval=20, checkpoint_interval=3600)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    optimizer=dict(opt="adamw", lr=1.5e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1.0),
    dtype="bfloat16",
)
param_scheduler = dict(
    type="VimCosineLR",
    by_epoch=True,
    convert_to_iter_based=True,
    total=400,
    warmup=20,
    warmup_lr=1e-6,
    min_lr=1e-5,
)
auto_scale_lr = dict(enable=False, base_batch_size=256)
