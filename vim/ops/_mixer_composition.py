"""The inside of Vim's mixer from a backend's convolution and scan, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MixerComposition"]


class MixerComposition:
    """Forward and backward of `bidirectional_mixer` from a convolution and a scan.

    Args:
        conv, scan: backends of `causal_conv1d` and `selective_scan`.
    """

    def __init__(self, conv, scan) -> None:
        self.conv = conv
        self.scan = scan

    def saved_specs(
        self, xz: Tensor, branch: list[Tensor]
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of what `forward` saves: for each direction, x_proj and states."""
        batch, length, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
        state = branch[5].shape[1]
        projected = (batch, length, branch[2].shape[0]), xz.dtype
        states = (
            tuple(self.scan.saved_shape(batch, length, channels, state)),
            torch.promote_types(xz.dtype, torch.float32),
        )
        return [projected, states] * 2

    def forward(self, xz, forward_branch, backward_branch, merge_scale, save):
        x, z = xz.chunk(2, dim=-1)
        projections, sides = [], []
        for branch, reverse in ((forward_branch, False), (backward_branch, True)):
            u = self._convolved(x, branch, reverse)
            projections.append(F.linear(u, branch[2].to(u.dtype)))
            sides.append(self._scan_inputs(u, projections[-1], branch))
        y, states = self.scans(sides, z, merge_scale, save)
        saved = [projections[0], states[0], projections[1], states[1]]
        return y, saved if save else []

    def scans(self, sides, z, merge_scale, save):
        """Return (y_forward + y_backward) * merge_scale * silu(z), and what either scan saves."""
        outputs, states = [], []
        for (*inputs, dt_bias), reverse in zip(sides, (False, True), strict=True):
            y, _, saved = self.scan.forward(*inputs, z, dt_bias, None, True, reverse, save)
            outputs.append(y)
            states.append(saved)
        y = outputs[0] + outputs[1]
        return (y if merge_scale == 1 else y * merge_scale), states

    def backward(self, dy, xz, forward_branch, backward_branch, saved, merge_scale):
        x, z = xz.chunk(2, dim=-1)
        if merge_scale != 1:
            dy = dy * merge_scale
        dxz = torch.zeros(
            xz.shape, dtype=torch.promote_types(xz.dtype, torch.float32), device=xz.device
        )
        dx, dz = dxz.chunk(2, dim=-1)
        gradients = []
        for branch, reverse in ((forward_branch, False), (backward_branch, True)):
            projected, states = saved[2:] if reverse else saved[:2]
            conv_weight, conv_bias, x_proj, dt_proj, _, A_log, _ = branch
            rank = dt_proj.shape[1]
            u = self._convolved(x, branch, reverse)
            *inputs, dt_bias = self._scan_inputs(u, projected, branch)
            du, ddt, dA, dB, dC, dD, dz_, ddt_bias, _ = self.scan.backward(
                dy, None, *inputs, z, dt_bias, None, states, True, reverse
            )
            ddt, dB, dC, du = (g.to(u.dtype) for g in (ddt, dB, dC, du))
            dprojected = torch.cat([F.linear(ddt, dt_proj.to(u.dtype).t()), dB, dC], dim=-1)
            ddt_proj = ddt.flatten(0, 1).t() @ projected[..., :rank].flatten(0, 1)
            dx_proj = dprojected.flatten(0, 1).t() @ u.flatten(0, 1)
            du = du + F.linear(dprojected, x_proj.to(u.dtype).t())
            dx_, dconv_weight, dconv_bias, _ = self.conv.backward(
                du, None, x, conv_weight, conv_bias, None, "silu", reverse
            )
            dx += dx_
            dz += dz_
            dA_log = -A_log.to(dA.dtype).exp() * dA
            gradients.append((dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA_log, dD))
        return [dxz, *(torch.stack(pair) for pair in zip(*gradients, strict=True))]

    def _convolved(self, x: Tensor, branch: list[Tensor], reverse: bool) -> Tensor:
        return self.conv.forward(x, branch[0], branch[1], None, "silu", reverse)[0]

    @staticmethod
    def _scan_inputs(u, projected, branch):
        """Return u, dt, A, B, C, D and dt_bias of a scan."""
        _, _, _, dt_proj, dt_bias, A_log, D = branch
        rank, state = dt_proj.shape[1], A_log.shape[1]
        dt, B, C = projected.split([rank, state, state], dim=-1)
        dt = F.linear(dt, dt_proj.to(u.dtype))
        A = -torch.exp(A_log.to(torch.promote_types(u.dtype, torch.float32)))
        return u, dt, A, B, C, D, dt_bias
