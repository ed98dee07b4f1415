"""timm's DeiT-Ti, of global attention, by the recipe of Vim-Ti: 44.4 box AP in arXiv:2401.09417.

The paper's DeiT has ViTDet's windows and global attention in four blocks; here all blocks see the
whole image, as Vim's do. Layer decay is ViTDet's 0.7 for twelve blocks. Not measured.
"""

_base_ = ["./vim-tiny-cascade-mask-rcnn_8xb8-lsj100e_coco-1024.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        name="deit_tiny_patch16_224",
        dynamic_img_size=True,
        drop_path_rate=0.1,
        checkpoint=None,
    )
)
optim_wrapper = dict(optimizer=dict(layer_decay=0.7))
