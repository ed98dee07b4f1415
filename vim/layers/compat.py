"""Drop-in names for code written against the patched forks of mamba_ssm and causal_conv1d.

Change the import, keep the rest::

    from vim.layers.compat import Mamba, mamba_inner_fn_no_out_proj, selective_scan_fn

Layouts and parameter names are the forks': (B, D, L) sequences, `A_b_log`, `conv1d_b` and so on,
so that their checkpoints load. Everything runs on `vim.ops`, gradients included. New code is better
off with `vim.ops` and `vim.layers`, which need no transposes.

Size letters: B batch, L tokens, D channels (d_inner), N state, R dt_rank, K width, G groups.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.ops import bidirectional_mixer, causal_conv1d, selective_scan
from vim.ops import causal_conv1d_update as _causal_conv1d_update
from vim.ops import selective_state_update as _selective_state_update

__all__ = [
    "Mamba",
    "bimamba_inner_fn",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "selective_scan_fn",
    "selective_state_update",
]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `vim.ops.selective_scan` in mamba_ssm's layout.

    Args:
        u, delta, z: (B, D, L).
        A: (D, N) real.
        B, C: (B, N, L), (B, G, N, L), or (D, N) where they do not depend on the input.
        D, delta_bias: (D,).
        delta_softplus: whether softplus is applied to the step size.
        return_last_state: whether the state after the last token is returned, too.

    Returns:
        (B, D, L) in the dtype of `u`, and, if asked, the last state (B, D, N).

    Raises:
        ValueError, TypeError: as `vim.ops.selective_scan`; TypeError for complex A.
    """
    if A.is_complex():
        raise TypeError("A must be real: complex states are not implemented, and Vim has none")
    B, C = _tokens_first(B, u), _tokens_first(C, u)
    if B.shape[2] != C.shape[2]:
        B, C = (x.repeat_interleave(u.shape[1] // x.shape[2], dim=2) for x in (B, C))
    y, state = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B,
        C,
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        dt_softplus=delta_softplus,
        return_final_state=True,
    )
    y = y.transpose(1, 2)
    return (y, state) if return_last_state else y


def _tokens_first(x: Tensor, u: Tensor) -> Tensor:
    """B or C in any of mamba_ssm's shapes -> (B, L, G, N)."""
    if x.dim() == 2:
        return x.expand(u.shape[0], u.shape[2], *x.shape)
    if x.dim() == 3:
        return x.transpose(1, 2).unsqueeze(2)
    return x.permute(0, 3, 1, 2)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Return the output of one token, (B, D), and write the new state into `state`, (B, D, N)."""
    y, new_state = _selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus
    )
    state.copy_(new_state)
    return y


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `vim.ops.causal_conv1d` in causal_conv1d's layout, by any of its signatures.

    Args:
        x: (B, D, L).
        weight: (D, K).
        bias: (D,).
        seq_idx: None; the activation where code of causal_conv1d 1.0 passes it fourth.
        initial_states: (B, D, K - 1).
        return_final_states: whether the last K - 1 inputs are returned, too, (B, D, K - 1).
        final_states_out: where to write them.
        activation: None, "silu" or "swish", which is the same.

    Raises:
        ValueError: `seq_idx` is given (packed sequences), or as `vim.ops.causal_conv1d`.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    if seq_idx is not None:
        raise ValueError("seq_idx must be None: packed sequences are not implemented")
    y, state = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation=_activation(activation),
        initial_state=None if initial_states is None else initial_states.transpose(1, 2),
        return_final_state=True,
    )
    y, state = y.transpose(1, 2), state.transpose(1, 2)
    if final_states_out is not None:
        state = final_states_out.copy_(state)
    return (y, state) if return_final_states else y


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Return the output of one token, (B, D), and write `x` into `conv_state`, (B, D, >= K - 1)."""
    past = weight.shape[1] - 1
    recent = conv_state[..., conv_state.shape[-1] - past :].transpose(1, 2)
    y, _ = _causal_conv1d_update(x, recent, weight, bias, activation=_activation(activation))
    conv_state.copy_(torch.cat([conv_state[..., 1:], x.unsqueeze(-1)], dim=-1))
    return y


def _activation(name: str | None) -> str | None:
    return "silu" if name == "swish" else name


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Return convolution, projections and gated scan of `xz`: (B, 2 D, L) -> (B, D, L).

    Args:
        xz: (B, 2 D, L) x, then the gate z.
        conv1d_weight: (D, 1, K).
        x_proj_weight: (R + 2 N, D), or less where `B` or `C` is given.
        delta_proj_weight: (D, R).
        A: (D, N).
        B, C: None where they come from x_proj; else as in `selective_scan_fn`.
        B_proj_bias, C_proj_bias: (N,) added to what comes from x_proj.
        checkpoint_lvl: ignored; the backward always recomputes.
    """
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    u, delta, B, C = _projected(
        x, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C
    )
    B = B if B_proj_bias is None else B + B_proj_bias.to(B.dtype)
    C = C if C_proj_bias is None else C + C_proj_bias.to(C.dtype)
    y = selective_scan(u, delta, A, B, C, D, z, delta_bias, dt_softplus=delta_softplus)
    return y.transpose(1, 2)


def _projected(x, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C):
    """Return u and delta, (B, L, D), and B and C, (B, L, [G,] N), of x (B, L, D)."""
    u = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, state = delta_proj_weight.shape[1], A.shape[1]
    sizes = [rank, state if B is None else 0, state if C is None else 0]
    delta, own_B, own_C = F.linear(u, x_proj_weight).split(sizes, dim=-1)
    like = u.transpose(1, 2)
    if B is not None or C is not None:
        own_B = own_B.unsqueeze(2) if B is None else _tokens_first(B, like)
        own_C = own_C.unsqueeze(2) if C is None else _tokens_first(C, like)
    return u, F.linear(delta, delta_proj_weight), own_B, own_C


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Return `mamba_inner_fn_no_out_proj` projected: (B, 2 D, L) -> (B, L, d_model)."""
    y = mamba_inner_fn_no_out_proj(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Return the first version of Vim's mixer: both scans share all but `A` and `A_b`.

    The sum of the two directions, projected: (B, 2 D, L) -> (B, L, d_model).
    """
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    u, delta, B, C = _projected(
        x, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C
    )
    B = B if B_proj_bias is None else B + B_proj_bias.to(B.dtype)
    C = C if C_proj_bias is None else C + C_proj_bias.to(C.dtype)
    y = sum(
        selective_scan(
            u, delta, a, B, C, D, z, delta_bias, dt_softplus=delta_softplus, reverse=reverse
        )
        for a, reverse in ((A, False), (A_b, True))
    )
    return F.linear(y, out_proj_weight, out_proj_bias)


def _decay(A_log: Tensor) -> Tensor:
    """Return A in float32 at least."""
    return -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()


class Mamba(nn.Module):
    """The mixer of the patched forks, parameter names included: (B, L, d_model) -> the same.

    Args:
        d_model, d_state, d_conv, expand, dt_rank: sizes, as in mamba_ssm.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: initial step sizes, as in mamba_ssm.
        conv_bias, bias: whether the convolutions and the projections have one.
        use_fast_path: ignored; there is one path, and it never drops a direction.
        layer_idx: key of this layer in the inference cache.
        bimamba_type: "none" (one direction), "v1" (Vim's first version), "v2" (Vim), "v3"
            (SegMamba: a third scan across `nslices` slices).
        if_divide_out: whether "v2" takes the mean of the directions rather than their sum.
        if_devide_out: the forks' spelling of the same.
        init_layer_scale: initial value of a factor on each output feature, or None.
        bimamba: VideoMamba's option; True is "v2".
        nslices: slices of "v3"; the number of tokens must be a multiple.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        bimamba_type: str = "none",
        if_divide_out: bool = False,
        if_devide_out: bool = False,
        init_layer_scale: float | None = None,
        bimamba: bool | None = None,
        nslices: int = 5,
    ) -> None:
        super().__init__()
        if bimamba is not None:
            bimamba_type = "v2" if bimamba else "none"
        suffixes = {"none": ("",), "v1": ("",), "v2": ("", "_b"), "v3": ("", "_b", "_s")}
        if bimamba_type not in suffixes:
            raise ValueError(
                f"bimamba_type must be one of {', '.join(suffixes)}, got {bimamba_type!r}"
            )
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.layer_idx = layer_idx
        self.bimamba_type = bimamba_type
        self.merge_scale = 0.5 if if_divide_out or if_devide_out else 1.0
        self.nslices = nslices

        dd = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **dd)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **dd)
        self.gamma = None
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), init_layer_scale, **dd))
        for suffix in suffixes[bimamba_type]:
            self._add_direction(suffix, conv_bias, (dt_min, dt_max, dt_init_floor), dd)
            weight = getattr(self, f"dt_proj{suffix}").weight
            std = self.dt_rank**-0.5 * dt_scale
            if dt_init == "constant":
                nn.init.constant_(weight, std)
            else:
                nn.init.uniform_(weight, -std, std)
        if bimamba_type == "v1":
            self.A_b_log = nn.Parameter(self.A_log.detach().clone())

    def _add_direction(self, suffix: str, conv_bias: bool, dt_range: tuple, dd: dict) -> None:
        """Register the parameters of one direction under the forks' names."""
        inner, state = self.d_inner, self.d_state
        conv1d = nn.Conv1d(
            inner, inner, self.d_conv, groups=inner, padding=self.d_conv - 1, bias=conv_bias, **dd
        )
        dt_proj = nn.Linear(self.dt_rank, inner, **dd)
        low, high, floor = dt_range
        dt = torch.rand(inner, device=dd["device"]) * (math.log(high) - math.log(low))
        dt = (dt + math.log(low)).exp().clamp(min=floor)
        with torch.no_grad():
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        A_log = torch.arange(1, state + 1, dtype=torch.float32, device=dd["device"]).log()
        setattr(self, f"conv1d{suffix}", conv1d)
        setattr(
            self,
            f"x_proj{suffix}",
            nn.Linear(inner, self.dt_rank + 2 * state, bias=False, **dd),
        )
        setattr(self, f"dt_proj{suffix}", dt_proj)
        setattr(self, f"A{suffix}_log", nn.Parameter(A_log.repeat(inner, 1)))
        setattr(self, f"D{suffix}", nn.Parameter(torch.ones(inner, device=dd["device"])))

    def _direction(self, suffix: str) -> list[Tensor]:
        """Return the tensors of a direction as `vim.ops.bidirectional_mixer` takes them."""
        conv1d, dt_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"dt_proj{suffix}")
        A_log = getattr(self, f"A{suffix}_log")
        return [
            conv1d.weight.squeeze(1),
            A_log.new_zeros(self.d_inner) if conv1d.bias is None else conv1d.bias,
            getattr(self, f"x_proj{suffix}").weight,
            dt_proj.weight,
            dt_proj.bias,
            A_log,
            getattr(self, f"D{suffix}"),
        ]

    def _one_direction(self, xz: Tensor, suffix: str) -> Tensor:
        """Return the gated scan of xz (B, L, 2 D) from the first token on, (B, L, D)."""
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = self._direction(suffix)
        return mamba_inner_fn_no_out_proj(
            xz.transpose(1, 2),
            conv_weight.unsqueeze(1),
            conv_bias,
            x_proj,
            dt_proj,
            _decay(A_log),
            D=D,
            delta_bias=dt_bias,
        ).transpose(1, 2)

    def forward(self, hidden_states: Tensor, inference_params=None) -> Tensor:
        """Return the mixed tokens.

        Raises:
            ValueError: `inference_params` with a model of two directions, whose output at a token
                depends on tokens to come; a number of tokens that slices do not divide.
        """
        if inference_params is not None:
            return self._forward_with_cache(hidden_states, inference_params)
        xz = self.in_proj(hidden_states)
        if self.bimamba_type == "none":
            y = self._one_direction(xz, "")
        elif self.bimamba_type == "v1":
            out = bimamba_inner_fn(
                xz.transpose(1, 2),
                self.conv1d.weight,
                self.conv1d.bias,
                self.x_proj.weight,
                self.dt_proj.weight,
                self.out_proj.weight,
                self.out_proj.bias,
                _decay(self.A_log),
                _decay(self.A_b_log),
                D=self.D,
                delta_bias=self.dt_proj.bias,
            )
            return out if self.gamma is None else out * self.gamma
        else:
            scale = self.merge_scale if self.bimamba_type == "v2" else 1.0
            y = bidirectional_mixer(xz, self._direction(""), self._direction("_b"), scale)
            if self.bimamba_type == "v3":
                y = y + self._across_slices(xz)
        out = self.out_proj(y)
        return out if self.gamma is None else out * self.gamma

    def _across_slices(self, xz: Tensor) -> Tensor:
        """Return the scan that takes the first token of every slice, then the second, ..."""
        if xz.shape[1] % self.nslices:
            raise ValueError(
                f"the number of tokens must be a multiple of nslices = {self.nslices}, "
                f"got {xz.shape[1]}"
            )
        xz = xz.unflatten(1, (self.nslices, -1)).transpose(1, 2).flatten(1, 2)
        y = self._one_direction(xz, "_s")
        return y.unflatten(1, (-1, self.nslices)).transpose(1, 2).flatten(1, 2)

    def _forward_with_cache(self, hidden_states: Tensor, inference_params) -> Tensor:
        if self.bimamba_type != "none":
            raise ValueError(
                "a model of two directions cannot be stepped: what it gives for a token depends "
                "on the tokens to come. Use bimamba_type='none', or call it without "
                "inference_params on the whole sequence"
            )
        if self.layer_idx is None:
            raise ValueError("the cache needs layer_idx: give it to the constructor")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(hidden_states.shape[0], 0)
        conv_state, ssm_state = cache[self.layer_idx]
        outputs = [
            self.step(token, conv_state, ssm_state)[0] for token in hidden_states.split(1, dim=1)
        ]
        return torch.cat(outputs, dim=1)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output of one token (B, 1, d_model); the states are updated in place."""
        if self.bimamba_type != "none":
            raise ValueError("a model of two directions cannot be stepped")
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = self._direction("")
        u = causal_conv1d_update(x, conv_state, conv_weight, conv_bias, "silu")
        dt, B, C = F.linear(u, x_proj).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = _decay(A_log)
        y = selective_state_update(
            ssm_state, u, F.linear(dt, dt_proj), A, B, C, D, z, dt_bias, dt_softplus=True
        )
        out = self.out_proj(y).unsqueeze(1)
        return out if self.gamma is None else out * self.gamma, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype=None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Return zero states: convolution (B, D, K) and scan (B, D, N, float32)."""
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        ssm_state = weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=torch.float32)
        return conv_state, ssm_state
