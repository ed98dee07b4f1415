"""What every run of a segmenter has; see default_runtime.py."""

_base_ = ["./default_runtime.py"]
default_hooks = dict(checkpoint=dict(save_best="mIoU"))
val_evaluator = dict(type="VimSegmentationMetric")
test_evaluator = dict(type="VimSegmentationMetric")
