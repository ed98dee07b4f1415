"""The inside of Vim's mixer, composed of this backend's convolution and scans."""

from vim.ops._mixer_composition import MixerComposition

from . import causal_conv1d, selective_scan, unavailable

__all__ = ["backward", "forward", "saved_specs", "unavailable"]


class _Composition(MixerComposition):
    def scans(self, sides, z, merge_scale, save):
        return selective_scan.forward_bidirectional(sides, z, merge_scale, save)


_composition = _Composition(causal_conv1d, selective_scan)
forward = _composition.forward
backward = _composition.backward
saved_specs = _composition.saved_specs
