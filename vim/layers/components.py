"""Mixers and feed-forwards by name, for models that take a choice for each block."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, TypeAlias

from torch import nn

from .attention import Attention
from .causal_mamba import Mamba
from .causal_mamba2 import Mamba2
from .feed_forward import mlp, swiglu
from .gated_conv import GatedConv
from .mamba import BidirectionalMamba
from .mamba2 import BidirectionalMamba2
from .mamba3 import BidirectionalMamba3
from .moe import MixtureOfExperts
from .recurrent import GRU, LSTM, RNN
from .s4d import S4D

__all__ = ["FFNS", "MIXERS", "Component", "build_ffns", "build_mixers"]

Component: TypeAlias = str | Mapping[str, Any] | Callable[..., nn.Module]
"""A name, a dict of a name and options (`{"name": "mamba2", "d_state": 128}`), or a function of
`dim`, `device` and `dtype`."""

MIXERS: dict[str, Callable[..., nn.Module]] = {
    "attention": Attention,
    "bimamba": BidirectionalMamba,
    "causal_mamba2": Mamba2,
    "gated_conv": GatedConv,
    "gru": GRU,
    "lstm": LSTM,
    "mamba": Mamba,
    "mamba2": BidirectionalMamba2,
    "mamba3": BidirectionalMamba3,
    "rnn": RNN,
    "s4d": S4D,
}
FFNS: dict[str, Callable[..., nn.Module | None]] = {
    "mlp": mlp,
    "moe": MixtureOfExperts,
    "none": lambda dim, device=None, dtype=None: None,
    "swiglu": swiglu,
}


def build_mixers(
    mixer: Component | Sequence[Component],
    depth: int,
    dim: int,
    bimamba: Mapping[str, Any],
    device=None,
    dtype=None,
) -> list[nn.Module]:
    """Return a mixer for each block.

    Args:
        mixer: one choice for all blocks, or a list with one for each; names are those of `MIXERS`.
        depth: number of blocks.
        dim: features of the tokens.
        bimamba: options of every "bimamba" that does not give its own.

    Raises:
        ValueError: an unknown name, a list of another length, or options in `bimamba` that no
            mixer takes.
        TypeError: an option that the mixer does not have.
    """
    choices = _per_block("mixer", mixer, depth)
    makers = [_maker("mixer", choice, MIXERS, {"bimamba": bimamba}) for choice in choices]
    if all(_name(choice) != "bimamba" for choice in choices):
        defaults = signature(BidirectionalMamba).parameters
        ignored = [name for name, value in bimamba.items() if value != defaults[name].default]
        if ignored:
            raise ValueError(
                f"{', '.join(ignored)} of the model go to 'bimamba' alone, and no block has it: "
                "give the mixer's options with its name, as {'name': 'mamba', 'd_state': 8}"
            )
    return [make(dim, device=device, dtype=dtype) for make in makers]


def build_ffns(
    ffn: Component | Sequence[Component], depth: int, dim: int, device=None, dtype=None
) -> list[nn.Module | None]:
    """Return a feed-forward for each block, None where it has none.

    Args:
        ffn: one choice for all blocks, or a list with one for each; names are those of `FFNS`.
        depth, dim: see `build_mixers`.

    Raises:
        ValueError, TypeError: see `build_mixers`.
    """
    makers = [_maker("ffn", choice, FFNS, {}) for choice in _per_block("ffn", ffn, depth)]
    return [make(dim, device=device, dtype=dtype) for make in makers]


def _per_block(kind: str, choice: Component | Sequence[Component], depth: int) -> list[Component]:
    if isinstance(choice, str | Mapping) or callable(choice):
        return [choice] * depth
    if len(choice) != depth:
        raise ValueError(f"{kind} must be one, or a list of depth = {depth}, got {len(choice)}")
    return list(choice)


def _name(choice: Component) -> str | None:
    return choice.get("name") if isinstance(choice, Mapping) else choice


def _maker(
    kind: str, choice: Component, known: Mapping[str, Callable], defaults: Mapping[str, Mapping]
) -> Callable[..., nn.Module | None]:
    """Return the function of (dim, device, dtype) that `choice` stands for."""
    if callable(choice):
        return choice
    name = _name(choice)
    if name not in known:
        raise ValueError(f"{kind} must be one of {', '.join(known)}, or callable, got {name!r}")
    options = {k: v for k, v in choice.items() if k != "name"} if name != choice else {}
    return partial(known[name], **(dict(defaults.get(name, {})) | options))
