"""Time each mixer against the same mixer composed of PyTorch's own ops, and Mamba-2 against Vim.

python benchmarks/mixers.py [--check] [--only NAME ...] [--json FILE]

Both take the same weights, bfloat16, and give the same result, which is checked first in float32 on
the CPU (that alone with --check). A step is forward and backward, in one CUDA graph. Compositions:

- bimamba, mamba: F.conv1d and a loop over the tokens, of all channels and states at once; the
  backward direction on flipped tokens. At 4,097 tokens it is left out.
- mamba2: F.conv1d and the four einsums of the paper's listing 1, chunks of 64, each direction for
  itself on flipped tokens.
- s4d: kernels by their D M L exponentials, and an FFT for each direction, one on flipped tokens.
- attention: softmax(q k^T) v by two products.
- lstm, gru, rnn: a network of one direction for each direction, one on flipped tokens.
- gated_conv: F.conv1d.
- moe, in training mode: one-hot masks, their cumulative sum for the places, and einsums with the
  tensors (B, L, E, C) that dispatch and combine (arXiv:2101.03961, appendix F; arXiv:2006.16668).
  An expert's capacity C is by image, and both drop the same tokens beyond it.

The last rows compare blocks (norm and mixer) of Mamba-2 and Vim, both with 64 states.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.layers import FFNS, MIXERS, AddNorm, VimBlock

SHAPES = [(128, 197, 192), (8, 4097, 192)]
BLOCKS = [(128, 197, 192), (128, 197, 384), (8, 4097, 192), (8, 4097, 384)]
STATES = 64


def conv(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the silu of a causal convolution: (B, L, D) -> (B, L, D)."""
    channels, width = layer.weight.shape
    x = F.pad(x.mT, (width - 1, 0))
    return F.silu(F.conv1d(x, layer.weight.unsqueeze(1), layer.bias, groups=channels)).mT


def scan_branch(branch: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """Return what `MambaBranch` returns, by a loop over the tokens."""
    if branch.reverse:
        x, z = x.flip(1), z.flip(1)
    u = conv(branch.conv1d, x)
    dt, B, C = branch.x_proj(u).split(branch.split_sizes, dim=-1)
    dt = F.softplus(branch.dt_proj(dt).float() + branch.dt_bias)
    decay = torch.exp(dt.unsqueeze(-1) * -torch.exp(branch.A_log))  # (B, L, D, N)
    drive = (dt * u).unsqueeze(-1) * B.float().unsqueeze(2)
    h, y = torch.zeros_like(drive[:, 0]), []
    # Slices of each token would have gradients of all.
    parts = (tensor.unbind(1) for tensor in (decay, drive, C.float().unsqueeze(2)))
    for decay_t, drive_t, C_t in zip(*parts, strict=True):
        h = decay_t * h + drive_t
        y.append((h * C_t).sum(-1))
    y = (torch.stack(y, 1) + branch.D * u) * F.silu(z.float())
    y = y.to(x.dtype)
    return y.flip(1) if branch.reverse else y


def plain_mamba(mixer: nn.Module, x: Tensor) -> Tensor:
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    return mixer.out_proj(scan_branch(mixer.branch, x, z))


def plain_bimamba(mixer: nn.Module, x: Tensor) -> Tensor:
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    y = scan_branch(mixer.forward_branch, x, z) + scan_branch(mixer.backward_branch, x, z)
    return mixer.out_proj(mixer.merge_scale * y)


def segment_sums(a: Tensor) -> Tensor:
    """Return sums of a_{j+1} ... a_i at [i, j], -inf above: (..., Q) -> (..., Q, Q)."""
    size = a.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=a.device)
    rows = a.unsqueeze(-1).expand(*a.shape, size).masked_fill(~ones.tril(-1), 0)
    return rows.cumsum(-2).masked_fill(~ones.tril(), -torch.inf)


def ssd_by_einsum(x: Tensor, a: Tensor, B: Tensor, C: Tensor, size: int = 64) -> Tensor:
    """Return the output of Mamba-2's state space model by arXiv:2405.21060, listing 1.

    Args:
        x: (B, L, H, P), times the step size.
        a: (B, L, H), logarithms of the decays.
        B, C: (B, L, N).
        size: tokens of a chunk.
    """
    length = x.shape[1]
    pad = -length % size
    x = F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, size))
    B, C = (F.pad(m, (0, 0, 0, pad)).unflatten(1, (-1, size)) for m in (B, C))
    a = F.pad(a, (0, 0, 0, pad)).unflatten(1, (-1, size)).permute(0, 3, 1, 2)  # (B, H, Z, Q)
    total = a.cumsum(-1)
    inside = segment_sums(a).exp().to(x.dtype)
    y = torch.einsum("bzln,bzsn,bhzls,bzshp->bzlhp", C, B, inside, x)
    to_end = torch.exp(total[..., -1:] - total).to(x.dtype)
    states = torch.einsum("bzln,bhzl,bzlhp->bzhpn", B, to_end, x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    passed = segment_sums(F.pad(total[..., -1], (1, 0))).exp().to(x.dtype)
    states = torch.einsum("bhzc,bchpn->bzhpn", passed, states)[:, :-1]
    y = y + torch.einsum("bzln,bzhpn,bhzl->bzlhp", C, states, total.exp().to(x.dtype))
    return y.flatten(1, 2)[:, :length]


def plain_mamba2(mixer: nn.Module, tokens: Tensor) -> Tensor:
    z, x, BC_f, BC_b, dt_f, dt_b, _ = mixer.in_proj(tokens).split(mixer.in_sizes, dim=-1)

    def one_direction(i: int, layer: nn.Module, x: Tensor, BC: Tensor, dt: Tensor) -> Tensor:
        u, B, C = conv(layer, torch.cat([x, BC], dim=-1)).split(mixer.conv_sizes, dim=-1)
        u = u.unflatten(-1, (-1, mixer.head_dim))
        dt = F.softplus(dt.float() + mixer.dt_bias[i])
        a = dt * -torch.exp(mixer.A_log[i])
        y = ssd_by_einsum((u * dt.unsqueeze(-1)).to(u.dtype), a, B, C)
        return (y + mixer.D[i].unsqueeze(-1).to(y.dtype) * u).flatten(-2)

    y = one_direction(0, mixer.forward_conv1d, x, BC_f, dt_f)
    flipped = (tensor.flip(1) for tensor in (x, BC_b, dt_b))
    y = 0.5 * (y + one_direction(1, mixer.backward_conv1d, *flipped).flip(1))
    y = F.rms_norm(y * F.silu(z), mixer.norm.weight.shape, mixer.norm.weight, 1e-5)
    return mixer.out_proj(y)


def plain_s4d(mixer: nn.Module, x: Tensor) -> Tensor:
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    s4d, length = mixer.s4d, x.shape[1]
    eigenvalues = torch.complex(-s4d.A_log.exp(), s4d.A_imag)
    exponents = s4d.log_dt.exp().unsqueeze(-1) * eigenvalues
    powers = torch.exp(exponents.unsqueeze(-1) * torch.arange(length, device=x.device))
    C = torch.view_as_complex(s4d.C) * torch.expm1(exponents) / eigenvalues
    kernels = 2 * torch.einsum("kdm,dml->kdl", C, powers).real
    u = x.float().mT

    def convolve(u: Tensor, kernel: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length]

    y = convolve(u, kernels[0]) + convolve(u.flip(-1), kernels[1]).flip(-1)
    y = (y + s4d.D.unsqueeze(-1) * u).mT.to(x.dtype)
    return mixer.out_proj(y * F.silu(z))


def plain_attention(mixer: nn.Module, x: Tensor) -> Tensor:
    qkv = mixer.in_proj(x).unflatten(-1, (3, -1, mixer.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = (q @ k.mT / math.sqrt(mixer.head_dim)).softmax(-1) @ v
    return mixer.out_proj(y.transpose(1, 2).flatten(2))


def two_networks(mixer: nn.Module) -> nn.ModuleList:
    """Return a network for each direction, with the weights of the mixer's one of both."""
    rnn = mixer.rnn
    pair = nn.ModuleList()
    for suffix in ("", "_reverse"):
        network = type(rnn)(rnn.input_size, rnn.hidden_size, batch_first=True)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(network, name).data = getattr(rnn, name + suffix).detach().clone()
        pair.append(network)
    return pair


def plain_recurrent(mixer: nn.Module, x: Tensor) -> Tensor:
    forward, backward = mixer.pair
    y = torch.cat([forward(x)[0], backward(x.flip(1))[0].flip(1)], dim=-1)
    return mixer.out_proj(y)


def plain_gated_conv(mixer: nn.Module, x: Tensor) -> Tensor:
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    channels, width = weight.shape
    y = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=width // 2, groups=channels).mT
    return mixer.out_proj(y * F.silu(z))


def plain_moe(moe: nn.Module, x: Tensor) -> Tensor:
    """Return what `MixtureOfExperts` of one expert a token returns, by products with masks."""
    gate, expert = F.linear(x.float(), moe.router.weight.float()).softmax(-1).max(-1)  # (B, L)
    mask = F.one_hot(expert, moe.num_experts)  # (B, L, E)
    position = (mask.cumsum(1) * mask).sum(-1) - 1  # in the line of its expert
    places = torch.arange(moe.places(x.shape[1]), device=x.device)
    place = position.unsqueeze(-1) == places  # (B, L, C), none beyond the capacity
    dispatch = mask.to(x.dtype).unsqueeze(-1) * place.unsqueeze(2)  # (B, L, E, C)
    combine = gate.to(x.dtype)[..., None, None] * dispatch
    inputs = torch.einsum("blec,bld->ebcd", dispatch, x)
    y = moe.fc2(moe.act(moe.fc1(inputs.flatten(1, 2)))).unflatten(1, inputs.shape[1:3])
    return torch.einsum("blec,ebcd->bld", combine, y)


PLAIN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "bimamba": plain_bimamba,
    "mamba": plain_mamba,
    "mamba2": plain_mamba2,
    "s4d": plain_s4d,
    "attention": plain_attention,
    "lstm": plain_recurrent,
    "gru": plain_recurrent,
    "rnn": plain_recurrent,
    "gated_conv": plain_gated_conv,
    "moe": plain_moe,
}
LOOPS = ("bimamba", "mamba")


def make(name: str, dim: int) -> nn.Module:
    """Return a mixer, or the experts, of so many features."""
    if name == "moe":  # in training mode, whose capacity is the smaller
        return FFNS["moe"](dim).train()
    mixer = MIXERS[name](dim)
    if name in ("lstm", "gru", "rnn"):
        mixer.pair = two_networks(mixer)
    return mixer


def check(name: str) -> float:
    """Return the error of a mixer against its composition in float32, relative to the largest."""
    torch.manual_seed(0)
    mixer, x = make(name, 64), torch.randn(2, 101, 64)
    with torch.no_grad():
        ours, plain = mixer(x), PLAIN[name](mixer, x)
    return float((ours - plain).abs().max() / plain.abs().max())


def calls(run: Callable, module: nn.Module, shape: tuple[int, ...]) -> tuple[list, list]:
    """Return the calls of a forward, and of a forward and backward, over sets of inputs."""
    from _timing import sets_of_inputs

    def make_inputs() -> tuple[Tensor, Tensor]:
        x, dy = torch.randn(2, *shape, device="cuda").bfloat16()
        return x.requires_grad_(), dy

    # Of the two forms of a recurrent network, each has weights of its own.
    x = make_inputs()[0]
    used = torch.autograd.grad(run(x).sum(), list(module.parameters()), allow_unused=True)
    wanted = [p for p, g in zip(module.parameters(), used, strict=True) if g is not None]
    sets = sets_of_inputs(make_inputs, 4 * x.numel())

    def forward(x: Tensor) -> None:
        with torch.no_grad():
            run(x)

    def step(x: Tensor, dy: Tensor) -> None:
        torch.autograd.grad(run(x), [x, *wanted], dy)

    return (
        [functools.partial(forward, x) for x, _ in sets],
        [functools.partial(step, x, dy) for x, dy in sets],
    )


def compare(runs: dict[str, tuple[Callable, nn.Module]], shape: tuple[int, ...]) -> dict:
    """Return ms of a forward and a step of each, and how many times the first is the faster."""
    from _timing import measure

    timed = {name: calls(run, module, shape) for name, (run, module) in runs.items()}
    row = {"B, L, D": ", ".join(map(str, shape))}
    first, second = runs
    for i, kind in enumerate(("forward", "step")):
        for name, ms in measure({n: pair[i] for n, pair in timed.items()}, repeats=3).items():
            row[f"{kind} {name}"] = ms
        row[f"{kind} times"] = row[f"{kind} {second}"] / row[f"{kind} {first}"]
    return row


def of_mixer(name: str, shape: tuple[int, ...]) -> dict:
    mixer = make(name, shape[-1]).to("cuda", torch.bfloat16)
    runs = {"ours": (mixer, mixer), "plain": (functools.partial(PLAIN[name], mixer), mixer)}
    return {"mixer": name} | compare(runs, shape)


def of_blocks(shape: tuple[int, ...]) -> dict:
    """Compare blocks of Mamba-2 (as "ours") and Vim (as "plain") with as many states."""
    runs = {}
    for label, name in (("ours", "mamba2"), ("plain", "bimamba")):
        mixer = MIXERS[name](shape[-1], d_state=STATES)
        block = VimBlock(AddNorm(shape[-1]), mixer).to("cuda", torch.bfloat16)
        residual = torch.randn(shape, device="cuda")
        runs[label] = (lambda x, b=block, r=residual: b(x, r)[0], block)
    return {"mixer": f"mamba2 : vim, N = {STATES}"} | compare(runs, shape)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare results, time nothing")
    parser.add_argument("--only", nargs="+", choices=[*PLAIN, "blocks"], default=[*PLAIN, "blocks"])
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args(argv)
    for name in [n for n in arguments.only if n in PLAIN]:
        error = check(name)
        sys.stderr.write(f"{name}: error {error:.1e}\n")
        if not error < 1e-4:
            sys.stdout.write(f"{name} and its composition differ by {error:.1e}; nothing timed\n")
            return 1
    if arguments.check:
        return 0
    from _timing import report

    jobs = [
        (f"{name} {shape}", functools.partial(of_mixer, name, shape))
        for shape in SHAPES
        for name in PLAIN
        if name in arguments.only and not (name in LOOPS and shape[1] > 1000)
    ]
    if "blocks" in arguments.only:  # the first, since they have a target
        jobs[:0] = [(f"blocks {shape}", functools.partial(of_blocks, shape)) for shape in BLOCKS]
    rows, table = [], ""
    for label, job in jobs:
        sys.stderr.write(f"timing {label}\n")
        try:
            rows.append(job())
        except (RuntimeError, NotImplementedError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
            rows.append({"mixer": label, "failed": reason})
        torch.cuda.empty_cache()
        table = report(rows, arguments.json)  # kept, whatever becomes of the rows to come
    sys.stdout.write(table + "\n")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
