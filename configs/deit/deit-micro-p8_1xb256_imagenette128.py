"""timm's DeiT in the size of Vim-micro, by the same recipe, with the same stem and pooling.

6 blocks of width 192 have 3.0 M parameters, against the 2.9 M of Vim-micro.
`model.backbone.embed_layer=patch` gives it DeiT's own patch embedding.
"""

_base_ = ["../vim/vim-micro-p8_1xb256_imagenette128.py"]
model = dict(
    backbone=dict(
        name="deit_tiny_patch16_224",
        img_size=128,
        patch_size=8,
        depth=6,
        embed_layer="conv",
        class_token=False,
        global_pool="avg",
    )
)
