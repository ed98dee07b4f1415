"""Official UPerNet on Vim-Ti: 41.0 mIoU on ADE20K, at one scale (Zhu et al., arXiv:2401.09417).

Source: hustvl/Vim, seg/configs and seg/scripts: rate 2e-4, weight decay 0.1, layer decay 0.92, no
class token in the scan, a decoder as wide as the backbone, four processes of 8 images. Set
model.backbone.checkpoint to the pre-trained file, the authors' or your own. The decoder is smp's,
which differs in details from mmsegmentation's, and the maps are of the residual stream, where
official Vim-Ti takes the mixers' outputs: 41.0 has not been measured with them.
"""

_base_ = [
    "../_base_/segmentation_runtime.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/official_segmentation_60k.py",
]
model = dict(
    type="VimSegmenter",
    backbone=dict(name="vim_tiny_patch16_224_pyramid", class_token=False, checkpoint=None),
    channels=192,
    dropout=0.1,
    auxiliary_level=2,
    auxiliary_channels=256,
    auxiliary_weight=0.4,
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.1, layer_decay=0.92))
default_hooks = dict(ema=None)
