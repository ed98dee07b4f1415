"""Official fine-tuning of Vim at finer granularity, patches 8 px apart: 80.5 to 81.6 % top-1.

Source: hustvl/Vim, vim/scripts/ft-vim-s.sh. Set model.backbone.checkpoint to the pre-trained
file, the authors' or your own; position embeddings are resampled.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/fine_tune_30e.py",
]
model = dict(
    type="VimClassifier",
    backbone=dict(name="vim_small_patch16_224", patch_stride=8, checkpoint=None),
    loss=dict(kind="soft-target"),
)
train_dataloader = dict(num_workers=25)
default_hooks = dict(ema=dict(decay=0.99996, warmup=False))
