"""The bidirectional Mamba mixer of Vim, and the branch it has twice."""

import math

import torch
from torch import Tensor, nn

from vim.ops import bidirectional_mixer
from vim.ops.selective_scan import scriptable_selective_scan

from ._bare import is_bare
from .causal_conv1d import CausalConv1d

__all__ = ["BidirectionalMamba", "MambaBranch"]


class MambaBranch(nn.Module):
    """Convolution and selective scan in one direction: (B, L, D), (B, L, D) -> (B, L, D).

    ::

        u        = silu(conv1d(x))
        dt, B, C = x_proj(u)
        y        = selective_scan(u, dt_proj(dt), -exp(A_log), B, C, D, gate z, dt_bias)

    Source: Gu & Dao 2023, arXiv:2312.00752, section 3.4 and algorithm 2.

    `A_log`, `D` and `dt_bias` stay float32 when the model is cast to a lower precision: they stand
    in exponents.

    Args:
        d_inner: D channels.
        d_state: N states a channel.
        d_conv: width of the convolution.
        dt_rank: R, the rank of the projection that makes the step size.
        reverse: whether to scan from the last token to the first.
        dt_min, dt_max, dt_init_floor: the step sizes start log-uniform in [dt_min, dt_max], and
            not under the floor.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        d_conv: int,
        dt_rank: int,
        *,
        reverse: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        fp32 = {"device": device, "dtype": torch.float32}
        self.reverse = reverse
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.split_sizes = [dt_rank, d_state, d_state]
        self.conv1d = CausalConv1d(d_inner, d_conv, reverse, **dd)
        self.x_proj = nn.Linear(d_inner, sum(self.split_sizes), bias=False, **dd)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(d_inner, **fp32))
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state, **fp32))
        self.D = nn.Parameter(torch.empty(d_inner, **fp32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high, floor = self.dt_range
        dt = torch.rand_like(self.dt_bias) * (math.log(high) - math.log(low)) + math.log(low)
        dt = dt.exp().clamp(min=floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        n = torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device)
        self.A_log.copy_(n.to(self.A_log.dtype).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def _apply(self, fn, recurse=True):
        for child in self.children():
            child._apply(fn)
        return super()._apply(lambda tensor: _keep_float32(fn, tensor), recurse=False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        u = self.conv1d(x)
        dt, B, C = self.x_proj(u).split(self.split_sizes, dim=-1)
        A = -torch.exp(self.A_log)
        return scriptable_selective_scan(
            u, self.dt_proj(dt), A, B, C, self.D, z, self.dt_bias, reverse=self.reverse
        )[0]

    def tensors(self) -> list[Tensor]:
        """Return the tensors of this direction as `bidirectional_mixer` takes them."""
        return [
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_bias,
            self.A_log,
            self.D,
        ]

    def extra_repr(self) -> str:
        return f"reverse={self.reverse}"


def _keep_float32(fn, tensor: Tensor) -> Tensor:
    """Return fn(tensor), but in the dtype of `tensor` where fn would lower its precision."""
    out = fn(tensor)
    if out.dtype in (torch.float16, torch.bfloat16):
        return tensor.to(device=out.device, dtype=torch.float32)
    return out


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a Linear or nothing, and bare, so that an op can do its work."""
    return type(module) in (nn.Linear, nn.Identity) and is_bare(module)


class BidirectionalMamba(nn.Module):
    """Mix tokens by selective scans in both directions: (B, L, dim) -> (B, L, dim).

    One input projection gives x and the gate z; two branches with parameters of their own scan x
    from either end; their outputs are merged and projected back.

    Source: Zhu et al. 2024, arXiv:2401.09417, algorithm 1 (the "v2" block of the authors' code).

    Args:
        dim: features of the tokens.
        d_state: N states a channel.
        d_conv: width of the short convolution.
        expand: d_inner = expand * dim.
        dt_rank: rank of the step size's projection; "auto" is ceil(dim / 16).
        merge: "mean" or "sum" of the two directions.
        norm_after_scan: whether LayerNorm stands between the merge and the output projection,
            which steadies large models, as in FastVim (Kapse et al. 2025).
        bias: whether the input and output projections have one.
        keep_states: whether a training step keeps the states of the scans for its backward, which
            is faster and takes more memory; see `vim.ops.bidirectional_mixer`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        merge: str = "mean",
        norm_after_scan: bool = False,
        bias: bool = False,
        keep_states: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if merge not in ("mean", "sum"):
            raise ValueError(f"merge must be 'mean' or 'sum', got {merge!r}")
        dd = {"device": device, "dtype": dtype}
        d_inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank == "auto" else int(dt_rank)
        branch = (d_inner, d_state, d_conv, rank)
        self.merge_scale = 0.5 if merge == "mean" else 1.0
        self.keep_states = keep_states
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=bias, **dd)
        self.forward_branch = MambaBranch(*branch, **dd)
        self.backward_branch = MambaBranch(*branch, reverse=True, **dd)
        self.norm = nn.LayerNorm(d_inner, **dd) if norm_after_scan else nn.Identity()
        self.out_proj = nn.Linear(d_inner, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.in_proj(x))

    @torch.jit.ignore
    def plain_projections(self) -> tuple[nn.Linear, nn.Linear] | None:
        """Return both projections if they are bare, and the output's follows the scans at once."""
        in_proj, norm, out_proj = self.in_proj, self.norm, self.out_proj
        kinds = type(in_proj), type(norm), type(out_proj)
        if kinds != (nn.Linear, nn.Identity, nn.Linear):
            return None
        return (in_proj, out_proj) if is_bare(in_proj, norm, out_proj) else None

    def mix(self, xz: Tensor) -> Tensor:
        """Return the output, of the input projection: (B, L, 2 d_inner) -> (B, L, dim)."""
        forward, backward = self.forward_branch.tensors(), self.backward_branch.tensors()
        if not torch.jit.is_scripting():  # noqa: SIM102, since TorchScript would compile the rest
            if _is_plain(self.out_proj) and _is_plain(self.norm):
                return bidirectional_mixer(
                    xz,
                    forward,
                    backward,
                    self.merge_scale,
                    out_weight=self.out_proj.weight,
                    out_bias=self.out_proj.bias,
                    keep_states=self.keep_states,
                )
        y = bidirectional_mixer(
            xz, forward, backward, self.merge_scale, keep_states=self.keep_states
        )
        return self.out_proj(self.norm(y))
