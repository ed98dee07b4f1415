"""The official pre-training schedule: hustvl/Vim, vim/main.py and vim/scripts/pt-vim-t.sh.

AdamW, cosine over 300 epochs, 5 of them warm-up, no clipping. Officially float32 throughout
(`--no_amp`), which is `optim_wrapper.dtype=float32`; here bf16 autocast with float32 weights,
residual stream and scans.
"""

train_cfg = dict(type="VimTrainLoop", max_epochs=300, val_interval=1)
optim_wrapper = dict(
    type="VimOptimWrapper",
    constructor="VimOptimizerConstructor",
    # --lr 5e-4 times 1024 images a step over 512
    optimizer=dict(opt="adamw", lr=5e-4 * 1024 / 512, weight_decay=0.1, eps=1e-8),
    dtype="bfloat16",
)
param_scheduler = dict(
    type="VimCosineLR", by_epoch=True, total=300, warmup=5, warmup_lr=1e-6, min_lr=1e-5
)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
