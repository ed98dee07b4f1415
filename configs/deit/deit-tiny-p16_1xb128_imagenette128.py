"""timm's DeiT-Ti by the recipe of Vim-Ti on Imagenette, for comparison."""

_base_ = ["../vim/vim-tiny-p16_1xb128_imagenette128.py"]
model = dict(backbone=dict(name="deit_tiny_patch16_224"))
