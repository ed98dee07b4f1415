"""S4D: a state space model that does not depend on its input, as one long convolution.

Size letters: B batch, L tokens, D d_inner, N state, M = N / 2 modes (the other half are their
conjugates).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.ops._autograd import composite

from ._autocast import no_autocast
from .float32_parameters import Float32Parameters

__all__ = ["S4D", "S4DConvolution"]


class S4DConvolution(Float32Parameters):
    """Convolve each channel with its past and its future: (B, L, D) -> (B, L, D).

    With lambda_n = -exp(A_log) + i A_imag, a step delta = exp(log_dt) and B = 1, discretised by
    zero-order hold::

        K_l = 2 Re sum_n C_n (exp(delta lambda_n) - 1) / lambda_n exp(l delta lambda_n)
        y_t = sum_{s <= t} K_{t-s} u_s + sum_{s >= t} K'_{s-t} u_s + D u_t

    K' differs from K by its C alone. Both directions are one convolution, computed by one FFT, in
    float32 at least, since FFTs of lower precision are neither accurate nor of any length.

    Source: Gu et al. 2022, "On the parameterization and initialization of diagonal state space
    models", arXiv:2206.11893, eq. 6 (kernel) and section 4 (initialisation); for both directions
    Goel et al. 2022, arXiv:2202.09729, eq. 7.

    Args:
        d_inner: D channels.
        d_state: N, even.
        init: where lambda_n starts: "lin" -1/2 + i pi n, "inv" -1/2 + i N / pi (N / (2n+1) - 1),
            "real" -(n + 1).
        dt_min, dt_max: the step sizes start log-uniform in [dt_min, dt_max].
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int = 64,
        init: Literal["lin", "inv", "real"] = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        device=None,
    ) -> None:
        super().__init__()
        if init not in ("lin", "inv", "real"):
            raise ValueError(f"init must be 'lin', 'inv' or 'real', got {init!r}")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state must be even and positive, got {d_state}")
        fp32 = {"device": device, "dtype": torch.float32}
        self.init = init
        self.dt_range = (dt_min, dt_max)
        modes = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(d_inner, **fp32))
        self.A_log = nn.Parameter(torch.empty(d_inner, modes, **fp32))
        self.A_imag = nn.Parameter(torch.empty(d_inner, modes, **fp32))
        self.C = nn.Parameter(torch.empty(2, d_inner, modes, 2, **fp32))  # directions; re, im
        self.D = nn.Parameter(torch.empty(d_inner, **fp32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        low, high = self.dt_range
        nn.init.uniform_(self.log_dt, math.log(low), math.log(high))
        modes = self.A_log.shape[1]
        n = torch.arange(modes, device=self.A_log.device, dtype=self.A_log.dtype)
        real, imag = torch.full_like(n, 0.5), math.pi * n
        if self.init == "inv":
            imag = 2 * modes / math.pi * (2 * modes / (2 * n + 1) - 1)
        elif self.init == "real":
            real, imag = n + 1, torch.zeros_like(n)
        self.A_log.copy_(real.log().expand_as(self.A_log))
        self.A_imag.copy_(imag.expand_as(self.A_imag))
        nn.init.normal_(self.C, std=0.5**0.5)  # a complex normal of variance 1
        nn.init.ones_(self.D)

    def forward(self, u: Tensor) -> Tensor:
        return torch.ops.vim.s4d(u, self.log_dt, self.A_log, self.A_imag, self.C, self.D)


def s4d_kernels(length: int, log_dt: Tensor, A_log: Tensor, A_imag: Tensor, C: Tensor) -> Tensor:
    """Return K and K' of `S4DConvolution`: (2, D, L)."""
    eigenvalues = torch.complex(-A_log.exp(), A_imag)
    exponents = log_dt.exp().unsqueeze(-1) * eigenvalues  # (D, M)
    C = torch.view_as_complex(C.contiguous()) * torch.expm1(exponents) / eigenvalues
    # With l = columns * i + j, exp(l x) = exp(columns i x) exp(j x): a product of matrices with
    # sqrt(L) rows and columns, instead of D * M * L exponentials.
    columns = math.ceil(math.sqrt(length))
    rows = -(-length // columns)
    i = torch.arange(rows, device=C.device) * columns
    j = torch.arange(columns, device=C.device)
    coarse = C.unsqueeze(2) * torch.exp(exponents.unsqueeze(1) * i.unsqueeze(-1))
    fine = torch.exp(exponents.unsqueeze(2) * j)
    left = torch.cat([coarse.real, -coarse.imag], dim=-1)  # (2, D, rows, 2 M)
    right = torch.cat([fine.real, fine.imag], dim=-2)  # (D, 2 M, columns)
    return 2 * (left @ right).flatten(-2)[..., :length]


@composite("s4d")
def _s4d(u: Tensor, log_dt: Tensor, A_log: Tensor, A_imag: Tensor, C: Tensor, D: Tensor) -> Tensor:
    length = u.shape[1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    with no_autocast(u.device.type):
        n = _fft_length(2 * length)
        past, future = s4d_kernels(length, log_dt, A_log, A_imag, C).to(dtype).unbind(0)
        # Lag -l stands at n - l, and both kernels have a term at lag 0.
        now = past[:, :1] + future[:, :1] + D.to(dtype).unsqueeze(-1)
        future = F.pad(future[:, 1:].flip(-1), (n - 2 * length + 1, 0))
        kernel = torch.cat([now, past[:, 1:], future], dim=-1)  # (D, n)
        spectrum = torch.fft.rfft(u.to(dtype), n=n, dim=1) * torch.fft.rfft(kernel).T
        return torch.fft.irfft(spectrum, n=n, dim=1)[:, :length].to(u.dtype)


def _fft_length(least: int) -> int:
    """Return 1, 3, 5 or 7 times a power of 2, `least` or more: FFTs are fast for it."""
    best = 1
    while best < least:
        best *= 2
    for factor in (3, 5, 7):
        length = factor
        while length < least:
            length *= 2
        best = min(best, length)
    return best


class S4D(nn.Module):
    """Mix tokens by S4D in both directions, gated as in Mamba: (B, L, dim) -> (B, L, dim).

    ::

        x, z = in_proj(tokens)
        y    = out_proj(s4d(x) * silu(z))

    It is Vim's mixer with a state space model that treats all tokens alike (and so needs no
    convolution before it): what the two differ by is what selection is worth.

    Args:
        dim: features of the tokens.
        d_state, init: see `S4DConvolution`.
        expand: D = d_inner = expand * dim.
        bias: whether the input and output projections have one.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        init: Literal["lin", "inv", "real"] = "lin",
        expand: float = 2,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d_inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=bias, **dd)
        self.s4d = S4DConvolution(d_inner, d_state, init, device=device)
        self.out_proj = nn.Linear(d_inner, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.s4d(x) * F.silu(z))
