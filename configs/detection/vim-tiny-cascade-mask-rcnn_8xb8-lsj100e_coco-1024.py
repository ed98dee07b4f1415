"""Official Cascade Mask R-CNN on Vim-Ti: 45.7 box and 39.2 mask AP on COCO (arXiv:2401.09417).

Source: hustvl/Vim, det/projects/ViTDet/configs/COCO: ViTDet's simple feature pyramid of 256
channels, two convolutions for proposals, three stages of boxes and a head for masks with LayerNorm,
drop path 0.1, no class token in the scan, 64 x 64 patches of an image of 1024 pixels, eight
processes of 8 images; layer decay 0.837, the root of ViTDet's 0.7, since Vim has twice as many
blocks. Set model.backbone.checkpoint to the pre-trained file, the authors' or your own; the one
that the authors started from, with rotary embeddings, was not released. Regions are pooled by
torchvision's RoIAlign, without half a pixel's shift, and boxes have its smooth L1 loss: 45.7 has
not been measured with them.
"""

_base_ = [
    "../_base_/detection_runtime.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/official_detection_100e.py",
]
model = dict(
    type="VimDetector",
    backbone=dict(
        name="vim_tiny_patch16_224_pyramid",
        img_size=1024,
        class_token=False,
        drop_path_rate=0.1,
        checkpoint=None,
    ),
    masks=True,
    cascade=True,
    channels=256,
    fc_channels=1024,
)
optim_wrapper = dict(optimizer=dict(layer_decay=0.7**0.5))
default_hooks = dict(ema=None)
