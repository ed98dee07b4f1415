"""The residual block of Vim."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vim.ops.block_sequence import BlockSequence, TrainingSequence

from ._bare import is_bare
from .add_norm import AddNorm
from .mamba import BidirectionalMamba

__all__ = ["FeedForward", "VimBlock"]


class FeedForward(nn.Module):
    """Add, normalise, transform: (B, L, D), (B, L, D) -> (B, L, D), (B, L, D).

    Args:
        norm: adds to the stream and normalises it.
        layer: (B, L, D) -> (B, L, D), each token for itself.
        drop_path: rate at which the incoming tokens, the output of the mixer, are dropped.
    """

    def __init__(self, norm: AddNorm, layer: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm = norm
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = self.norm(self.drop_path(x), residual)
        return self.layer(x), residual


class _NoFeedForward(nn.Module):
    """Pass on what comes."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x, residual


class VimBlock(nn.Module):
    """Add, normalise, mix: (B, L, D), (B, L, D) -> three (B, L, D).

    The residual stream travels beside the tokens, and what a block computes joins it at the start
    of the next one, so that addition and norm are one op. A block returns what it computed last,
    the stream that this is to join, and the stream as the block found it: the sum of the first two
    outputs of the block before it, of which `drop_path` may have dropped some items.

    Args:
        norm: adds to the stream and normalises it.
        mixer: (B, L, D) -> (B, L, D).
        drop_path: rate at which the incoming tokens, the output of the block before, are dropped.
        ffn: what follows the mixer in the same way; None for nothing, as in Vim.
    """

    def __init__(
        self,
        norm: AddNorm,
        mixer: nn.Module,
        drop_path: float = 0.0,
        ffn: FeedForward | None = None,
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm = norm
        self.mixer = mixer
        self.ffn = _NoFeedForward() if ffn is None else ffn

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x, stream = self.norm(self.drop_path(x), residual)
        x, residual = self.ffn(self.mixer(x), stream)
        return x, residual, stream

    @torch.jit.ignore
    def run(self, flow: list[Tensor | None], sequence: BlockSequence | None = None) -> None:
        """Replace [x, residual] by what `forward` makes of them; for inference.

        Whoever calls a module keeps its arguments alive until it returns. Here nobody keeps the
        incoming tokens and stream, which nothing needs after the norm, nor the normed tokens, which
        Vim's mixer does not need after its input projection: 8 bytes a token and feature
        in bfloat16.

        Args:
            flow: [x, residual] as for `forward`, which nothing else refers to.
            sequence: of the ops of this pass, if one serves.
        """
        if sequence is not None:
            if self._run_in(sequence, flow):
                return
            sequence.keep()
        if not is_bare(self):
            flow[:] = self(*flow)[:2]
            return
        x, residual = self.norm(self.drop_path(flow[0]), flow[1])
        flow.clear()
        if type(self.mixer) is BidirectionalMamba and is_bare(self.mixer):
            x = self.mixer.in_proj(x)
            x = self.mixer.mix(x)
        else:
            x = self.mixer(x)
        flow += self.ffn(x, residual)

    def _run_in(self, sequence: BlockSequence, flow: list[Tensor | None]) -> bool:
        """`run`, and return True, if the block is Vim's, and nobody sees what happens inside."""
        projections = self._plain_projections()
        if projections is None:
            return False
        in_proj, out_proj = projections
        norm, mixer = self.norm, self.mixer
        x, residual = sequence.add_norm(
            self.drop_path(flow[0]), flow[1], norm.weight, norm.bias, norm.eps, norm.kind
        )
        flow.clear()
        x = in_proj(x)
        branches = mixer.forward_branch.tensors(), mixer.backward_branch.tensors()
        x = sequence.bidirectional_mixer(x, *branches, mixer.merge_scale)
        flow += sequence.project(x, out_proj.weight, out_proj.bias), residual
        return True

    @torch.jit.ignore
    def train_in(
        self, sequence: TrainingSequence, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what calling the block does, by the ops of a training step's `sequence`."""
        projections = self._plain_projections()
        if projections is None:
            return self(x, residual)
        in_proj, out_proj = projections
        norm, mixer = self.norm, self.mixer
        x, stream = sequence.block(
            self.drop_path(x),
            residual,
            (norm.weight, norm.bias),
            (in_proj.weight, in_proj.bias),
            mixer.forward_branch.tensors(),
            mixer.backward_branch.tensors(),
            (out_proj.weight, out_proj.bias),
            eps=norm.eps,
            kind=norm.kind,
            merge_scale=mixer.merge_scale,
            keep_states=mixer.keep_states,
        )
        return x, stream, stream

    def _plain_projections(self) -> tuple[nn.Linear, nn.Linear] | None:
        """Return the mixer's projections if the block is Vim's, and nobody looks inside."""
        drop_path, norm, mixer, ffn = self.drop_path, self.norm, self.mixer, self.ffn
        plain = (
            type(norm) is AddNorm
            and type(mixer) is BidirectionalMamba
            and type(drop_path) in (nn.Identity, DropPath)
            and type(ffn) is _NoFeedForward
            and is_bare(self, drop_path, norm, mixer, ffn)
        )
        return mixer.plain_projections() if plain else None

    @torch.jit.ignore
    def scan(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return what `forward` does, of a chunk of a sequence, and the mixer's state after it.

        Args:
            x, residual: (B, L, D) as for `forward`.
            state: of the mixer before the chunk, see `Mamba.scan`; None at the start.
        """
        x, stream = self.norm(self.drop_path(x), residual)
        x, state = self.mixer.scan(x, state)
        x, residual = self.ffn(x, stream)
        return x, residual, stream, state
