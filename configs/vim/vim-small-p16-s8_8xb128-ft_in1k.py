"""Official fine-tuning of Vim-S at finer granularity: 80.5 to 81.6 % top-1.

As that of Vim-Ti. Source: hustvl/Vim, vim/scripts/ft-vim-s.sh.
"""

_base_ = ["vim-tiny-p16-s8_8xb128-ft_in1k.py"]
model = dict(backbone=dict(name="vim_small_patch16_224"))
