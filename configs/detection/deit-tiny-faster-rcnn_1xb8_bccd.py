"""timm's DeiT-Ti by the recipe of Vim-Ti on BCCD, for comparison."""

_base_ = ["./vim-tiny-faster-rcnn_1xb8_bccd.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        name="deit_tiny_patch16_224",
        img_size=(448, 576),
        dynamic_img_size=True,
        drop_path_rate=0.1,
        checkpoint=None,
    )
)
