"""Official Cascade Mask R-CNN on Vim-S; as for Vim-Ti, also for what has not been measured."""

_base_ = ["./vim-tiny-cascade-mask-rcnn_8xb8-lsj100e_coco-1024.py"]
model = dict(backbone=dict(name="vim_small_patch16_224_pyramid"))
