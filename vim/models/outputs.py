"""What models return beside tokens and logits, in the manner of transformers.

Size letters: B batch, L tokens, D embed_dim, E d_inner, N d_state, K width of the convolution.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

__all__ = ["MambaCache", "VisionMambaOutput"]


@dataclass
class MambaCache:
    """What mixers of one direction remember of the tokens that they have read, for each block.

    Its size does not depend on how many those were. Nothing mutates it: an older one continues from
    where it was.

    Args:
        conv_states: (B, K - 1, E), of "causal_mamba2" (B, K - 1, E + 2 N): the last inputs of the
            convolution, oldest first; None for a block whose mixer has no state.
        ssm_states: (B, E, N), of "causal_mamba2" (B, heads, E / heads, N): the states of the scan,
            float32 at least; or None.
        patches: how many have been read; None where other tokens have been, too, or where not every
            block has a state that others can follow: such a cache is to be looked at alone.
    """

    conv_states: list[Tensor | None]
    ssm_states: list[Tensor | None]
    patches: int | None = None

    def detach(self) -> "MambaCache":
        """Return the same values without their graph, for training on a stream piece by piece."""
        conv, ssm = (
            [None if state is None else state.detach() for state in states]
            for states in (self.conv_states, self.ssm_states)
        )
        return MambaCache(conv, ssm, self.patches)


@dataclass
class VisionMambaOutput:
    """What `VisionMamba.forward_outputs` returns: by attribute, key or index, as in transformers.

    Keys and indices pass over what was not asked for.

    Args:
        last_hidden_state: (B, L, D) normed tokens, prefix tokens first, as `forward_features`.
        hidden_states: depth + 1 of (B, L, D), prefix tokens first: the residual stream that each
            block reads, float32 at least (the first is the embedded image), then
            `last_hidden_state`.
        cache_params: the states of mixers of one direction, after the scan of all tokens.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    cache_params: MambaCache | None = None

    def keys(self) -> list[str]:
        """Return the names of what is there."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def to_tuple(self) -> tuple:
        """Return what is there."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(f"{key!r} is not among {', '.join(self.keys())}")
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())
