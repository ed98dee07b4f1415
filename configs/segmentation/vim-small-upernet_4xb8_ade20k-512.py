"""Official UPerNet on Vim-S: 44.9 mIoU on ADE20K, at one scale (Zhu et al., arXiv:2401.09417).

Source: hustvl/Vim, seg/configs and seg/scripts: rate 1e-4, weight decay 0.05, layer decay 0.95.
Else as for Vim-Ti; see vim-tiny-upernet_4xb8_ade20k-512.py, also for what has not been measured.
"""

_base_ = ["./vim-tiny-upernet_4xb8_ade20k-512.py"]
model = dict(backbone=dict(name="vim_small_patch16_224_pyramid"), channels=384)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05, layer_decay=0.95))
