"""Patch tokens of a layer, of one backbone or of several fused: what a language model is shown.

Source: Zhao et al. 2024, "Cobra: Extending Mamba to Multi-Modal Large Language Model for Efficient
Inference", arXiv:2403.14520, and its code, https://github.com/h-zhao1997/cobra,
`cobra/models/backbones/vision/dinosiglip_vit.py`: the layer before the last, without class and
register tokens, backbones side by side in the channels.

Size letters: B batch, N = H W visual tokens and their grid, D width, of fused backbones the sum.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import PatchDropout
from torch import Tensor, nn

__all__ = ["visual_maps", "visual_tokens"]


def visual_tokens(
    models: nn.Module | Sequence[nn.Module],
    images: Tensor | Sequence[Tensor],
    layer: int | Sequence[int] = -2,
    *,
    norm: bool = False,
    grid: int | tuple[int, int] | None = None,
) -> Tensor:
    """Return the patch tokens of a layer, row by row, without prefix tokens: (B, N, D).

    Differentiable, and neither frozen nor switched to evaluation here: call `model.eval()` before
    and, where the backbone is not trained, this function under `torch.no_grad()`.

    Args:
        models: a backbone, of timm or of this library, that has `forward_intermediates`; or
            several, whose tokens are concatenated channel by channel.
        images: (B, C, H, W) for all backbones, or one such tensor for each, since each may want its
            own size and normalisation.
        layer: index of the layer, for all or one for each backbone, negative ones from the last: a
            block of a plain model, a stage of a hierarchical one.
        norm: whether the final norm is applied, where the backbone can.
        grid: side or (height, width) to which all tokens are brought; None is the grid of the
            first backbone.

    Returns:
        (B, N, D) in the dtype of the weights, the widest where backbones differ. Where grids differ
        tokens are resampled bilinearly, antialiased towards a coarser grid; where they do not,
        tokens are untouched.

    Raises:
        TypeError: `models` or `images` of the wrong kind.
        ValueError: a layer out of range; not as many images or layers as backbones; batches of
            several sizes; patches that are dropped.
    """
    maps = visual_maps(models, images, layer, norm=norm, grid=grid)
    return maps.flatten(2).transpose(1, 2)


def visual_maps(
    models: nn.Module | Sequence[nn.Module],
    images: Tensor | Sequence[Tensor],
    layer: int | Sequence[int] = -2,
    *,
    norm: bool = False,
    grid: int | tuple[int, int] | None = None,
) -> Tensor:
    """Return the tokens of `visual_tokens` as the map that they are: (B, D, H, W)."""
    models = _models(models)
    images = _one_each("images", images, Tensor, len(models))
    layers = _one_each("layer", layer, int, len(models))
    for x in images:
        if x.dim() != 4:
            raise ValueError(
                f"images must be (B, C, H, W), got {tuple(x.shape)}"
                + (": give a single image as image[None]" if x.dim() == 3 else "")
            )
    if len({len(x) for x in images}) > 1:
        raise ValueError(
            "every backbone must be given the same images, got batches of "
            f"{', '.join(str(len(x)) for x in images)}"
        )
    if isinstance(grid, int):
        grid = (grid, grid)
    if grid is not None and (len(grid) != 2 or min(grid) < 1):
        raise ValueError(f"grid must be a positive side or (height, width), got {grid}")
    maps = [_map(m, x, i, norm) for m, x, i in zip(models, images, layers, strict=True)]
    grid = tuple(maps[0].shape[2:] if grid is None else grid)
    maps = [_resampled(y, grid) for y in maps]
    return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)


def _models(models: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    several = isinstance(models, (list, tuple, nn.ModuleList))
    models = list(models) if several else [models]
    if not models:
        raise ValueError("models must be a backbone or several, got none")
    for model in models:
        if not hasattr(model, "forward_intermediates"):
            raise TypeError(
                "models must have forward_intermediates, as timm's backbones do, got "
                f"{type(model).__name__}: create it without features_only=True, or pass the model "
                "that it wraps"
            )
        if model.training and isinstance(getattr(model, "patch_drop", None), PatchDropout):
            raise ValueError(
                f"{type(model).__name__} drops patches while it is trained, and the rest has no "
                "grid: call model.eval(), or create it with patch_drop_rate=0"
            )
    return models


def _one_each(name: str, value: object, kind: type, count: int) -> list:
    """Return one value for each of `count` backbones: `value` for all, or a sequence of them."""
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, kind) for v in value):
        raise TypeError(
            f"{name} must be of type {kind.__name__}, or a list of one for each backbone, got "
            f"{type(value).__name__}"
        )
    if len(value) != count:
        raise ValueError(
            f"{name} must be one for all backbones or one for each of the {count}, got {len(value)}"
        )
    return list(value)


def _map(model: nn.Module, images: Tensor, layer: int, norm: bool) -> Tensor:
    """Return the map of one layer of one backbone, in the dtype of its weights."""
    depth = len(model.feature_info)
    if not -depth <= layer < depth:
        raise ValueError(
            f"layer of {type(model).__name__} must be from {-depth} to {depth - 1}, got {layer}"
        )
    (y,) = model.forward_intermediates(
        images,
        indices=[layer],  # by name: not every backbone has it second
        norm=norm,
        stop_early=True,
        output_fmt="NCHW",  # the one that every backbone of timm has
        intermediates_only=True,
    )
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return y.to(dtype)  # Vim's residual stream may be wider


def _resampled(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, D, H, W) -> (B, D, *grid); the dtype stays."""
    if tuple(x.shape[2:]) == grid:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(wide, size=grid, mode="bilinear", antialias=True).to(x.dtype)
