"""Mask R-CNN on Vim-Ti by the recipe of the official cascade, with one stage of boxes."""

_base_ = ["./vim-tiny-cascade-mask-rcnn_8xb8-lsj100e_coco-1024.py"]
model = dict(cascade=False)
