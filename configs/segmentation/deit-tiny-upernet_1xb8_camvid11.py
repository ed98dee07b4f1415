"""timm's DeiT-Ti by the recipe of Vim-Ti on CamVid, for comparison.

Four of its twelve blocks are rescaled to strides 4 to 32, as Vim's are.
"""

_base_ = ["./vim-tiny-upernet_1xb8_camvid11.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        name="deit_tiny_patch16_224",
        out_indices=(2, 5, 8, 11),
        dynamic_img_size=True,
        dynamic_img_pad=True,
        drop_path_rate=0.1,
        checkpoint=None,
    )
)
