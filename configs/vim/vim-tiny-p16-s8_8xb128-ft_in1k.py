"""Official fine-tuning of Vim at finer granularity, patches 8 px apart: 76.1 to 78.3 % top-1.

Source: hustvl/Vim, vim/scripts/ft-vim-t.sh. Set model.backbone.checkpoint to the pre-trained
file, the authors' or your own; position embeddings are resampled.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/fine_tune_30e.py",
]
model = dict(
    type="VimClassifier",
    backbone=dict(name="vim_tiny_patch16_224", patch_stride=8, checkpoint=None),
    loss=dict(kind="soft-target"),
)
train_dataloader = dict(num_workers=25)
default_hooks = dict(ema=dict(decay=0.99996, warmup=False))
