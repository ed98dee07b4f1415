"""Projectors: what brings visual tokens to the width of a language model.

Sources: Zhao et al. 2024, "Cobra: Extending Mamba to Multi-Modal Large Language Model for Efficient
Inference", arXiv:2403.14520, and its code, https://github.com/h-zhao1997/cobra,
`cobra/util/nn_utils.py`, whose names and state dicts these are; each projector's own source stands
in `PROJECTORS`.

Size letters: B batch, N visual tokens, H W their grid, D vision_dim, E llm_dim.
"""

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PROJECTORS", "LDPProjector", "MLPProjector", "build_projector"]


class MLPProjector(nn.Module):
    """Each token by itself through linear layers, GELU between them: (B, N, D) -> (B, N, E).

    Args:
        vision_dim: D.
        llm_dim: E.
        hidden_dims: widths between them; none makes it linear.

    Raises:
        ValueError: a width that is not positive.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        hidden_dims: Sequence[int] = (),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dims = [vision_dim, *hidden_dims, llm_dim]
        if min(dims) < 1:
            raise ValueError(
                "vision_dim, hidden_dims and llm_dim must be positive, got "
                f"{vision_dim}, {tuple(hidden_dims)} and {llm_dim}"
            )
        self.vision_dim = vision_dim
        self.llm_dim = llm_dim
        layers: list[nn.Module] = []
        for i in range(len(dims) - 1):
            if layers:
                layers.append(nn.GELU())
            layers.append(nn.Linear(dims[i], dims[i + 1], device=device, dtype=dtype))
        # A single layer has no index in Cobra's state dicts.
        self.projector = nn.Sequential(*layers) if hidden_dims else layers[0]

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the projected tokens.

        Args:
            x: (B, N, D) visual tokens.
            grid: ignored, here so that all projectors are called alike.
        """
        if x.dim() != 3 or x.shape[2] != self.vision_dim:
            raise ValueError(
                f"visual tokens must be (B, N, {self.vision_dim}), got {tuple(x.shape)}: build the "
                "projector with vision_dim equal to the width of the tokens"
            )
        return self.projector(x)


class LDPProjector(MLPProjector):
    """Project, pool to fewer tokens, add where they stand: (B, H W, D) -> (B, H' W', E).

    x = MLP(x); x = AdaptiveAvgPool(x, H' x W'); x + DepthwiseConv3x3(x)

    The lightweight downsample projector LDPv2 of MobileVLM V2 (Chu et al. 2024, arXiv:2402.03766)
    with the 14 x 14 tokens of Cobra's `LDPProjector` and `FusedLDPProjector`, whose state dicts it
    loads. Grids need not be square.

    Args:
        vision_dim, llm_dim, hidden_dims: see `MLPProjector`.
        out_grid: side or (H', W').
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        hidden_dims: Sequence[int] = (),
        out_grid: int | tuple[int, int] = 14,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(vision_dim, llm_dim, hidden_dims, device=device, dtype=dtype)
        self.out_grid = (out_grid, out_grid) if isinstance(out_grid, int) else tuple(out_grid)
        if len(self.out_grid) != 2 or min(self.out_grid) < 1:
            raise ValueError(
                f"out_grid must be a positive side or (height, width), got {out_grid!r}"
            )
        self.position = nn.Conv2d(
            llm_dim, llm_dim, 3, padding=1, groups=llm_dim, device=device, dtype=dtype
        )
        self.register_load_state_dict_pre_hook(_rename_position)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return fewer, projected tokens.

        Args:
            x: (B, N, D) visual tokens, row by row.
            grid: (H, W) of the tokens, see `vim.models.visual_maps`; None takes it for square.

        Raises:
            ValueError: tokens that `grid` does not hold, or a grid smaller than `out_grid`.
        """
        x = super().forward(x)
        height, width = self._grid(x.shape[1], grid)
        x = x.transpose(1, 2).unflatten(2, (height, width))
        x = F.adaptive_avg_pool2d(x, self.out_grid)
        x = x + self.position(x)
        return x.flatten(2).transpose(1, 2)

    def _grid(self, count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        if grid is None:
            side = math.isqrt(count)
            if side * side != count:
                raise ValueError(f"{count} tokens are no square: pass their grid=(height, width)")
            grid = (side, side)
        if grid[0] * grid[1] != count:
            raise ValueError(
                f"grid must hold the {count} tokens, got {tuple(grid)}, which holds "
                f"{grid[0] * grid[1]}"
            )
        if grid[0] < self.out_grid[0] or grid[1] < self.out_grid[1]:
            raise ValueError(
                f"the grid of the tokens, {tuple(grid)}, is smaller than out_grid="
                f"{self.out_grid}, to which they are pooled: build LDPProjector with a smaller "
                "out_grid, or take larger images"
            )
        return grid[0], grid[1]


def _rename_position(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Take the convolution from where Cobra's sequence of layers has it."""
    if isinstance(module.projector, nn.Sequential):
        official = f"{prefix}projector.{len(module.projector) + 1}.peg.0."  # behind the pooling
        for name in [n for n in state_dict if n.startswith(official)]:
            state_dict[f"{prefix}position.{name.removeprefix(official)}"] = state_dict.pop(name)


# Name to the kind and its hidden widths, from vision_dim and llm_dim.
PROJECTORS: dict[str, tuple[type[MLPProjector], Callable[[int, int], tuple[int, ...]]]] = {
    # LLaVA: Liu et al. 2023, arXiv:2304.08485.
    "linear": (MLPProjector, lambda vision_dim, llm_dim: ()),
    # LLaVA-1.5: Liu et al. 2023, arXiv:2310.03744.
    "gelu-mlp": (MLPProjector, lambda vision_dim, llm_dim: (llm_dim,)),
    # For fused backbones, from Prismatic VLMs: Karamcheti et al. 2024, arXiv:2402.07865; Cobra's.
    "fused-gelu-mlp": (MLPProjector, lambda vision_dim, llm_dim: (4 * vision_dim, llm_dim)),
    # LDPv2 of MobileVLM V2: Chu et al. 2024, arXiv:2402.03766.
    "ldpnet": (LDPProjector, lambda vision_dim, llm_dim: (llm_dim,)),
    # The same behind Cobra's wide first layer.
    "fused-ldpnet": (LDPProjector, lambda vision_dim, llm_dim: (4 * vision_dim,)),
}


def build_projector(
    name: str, vision_dim: int, llm_dim: int, device=None, dtype=None
) -> MLPProjector:
    """Return a projector by Cobra's name for it.

    Args:
        name: "linear", "gelu-mlp", "fused-gelu-mlp", "ldpnet" or "fused-ldpnet", see `PROJECTORS`.
        vision_dim: width of the visual tokens; that of fused backbones is the sum of theirs.
        llm_dim: width of the language model's embeddings.
    """
    if name not in PROJECTORS:
        raise ValueError(f"name must be one of {', '.join(PROJECTORS)}, got {name!r}")
    kind, hidden_dims = PROJECTORS[name]
    return kind(vision_dim, llm_dim, hidden_dims(vision_dim, llm_dim), device=device, dtype=dtype)
