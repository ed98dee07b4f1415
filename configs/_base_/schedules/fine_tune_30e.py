"""The official fine-tuning schedule: hustvl/Vim, vim/scripts/ft-vim-t.sh.

30 epochs at a constant rate: --lr 5e-6 times 1024 images a step over 512, which is --min-lr, too.
"""

train_cfg = dict(type="VimTrainLoop", max_epochs=30, val_interval=1)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    optimizer=dict(opt="adamw", lr=5e-6 * 1024 / 512, weight_decay=1e-8, eps=1e-8),
    dtype="bfloat16",
)
param_scheduler = dict(
    type="VimCosineLR", by_epoch=True, total=30, warmup=5, warmup_lr=1e-5, min_lr=1e-5
)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
