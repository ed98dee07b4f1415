"""Vision Mamba as a backbone of dense prediction: maps of some blocks, and a pyramid of them.

Source: the authors' segmentation code, https://github.com/hustvl/Vim, `seg/backbone/vim.py`.

Size letters: B batch, D embed_dim, H W image.
"""

import math
import re
from collections.abc import Sequence

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureInfo, feature_take_indices
from torch import Tensor, nn

from vim.layers import AddNorm

from ._checkpoint import checkpoint_filter_fn, is_official, to_native
from .vision_mamba import _BASE, _SMALL, _TINY, VisionMamba, _cfg

__all__ = [
    "STRIDES",
    "VisionMambaMaps",
    "VisionMambaPyramid",
    "pass_on_classification_weights",
    "rescaling",
]

STRIDES = (4, 8, 16, 32)
_BLOCK = re.compile(r"^blocks\.(\d+)\.")


def pass_on_classification_weights(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, child: str
) -> None:
    """Give a classifier's weights, where `state_dict` has them, to `child`, a part of `module`.

    They have nothing for the rest of `module`, which stays as it is. Any other state dict is left
    alone.
    """
    weights = _classification_weights(state_dict, prefix)
    for name, value in weights.items():
        state_dict[f"{prefix}{child}.{name}"] = value
        del state_dict[prefix + name]
    if weights:
        for name, value in module.state_dict().items():
            if not name.startswith(f"{child}."):
                state_dict[prefix + name] = value


def _classification_weights(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return what stands under `prefix`, if it is a classifier, the authors' or ours; or {}."""
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    return own if is_official(own) or any(map(_BLOCK.match, own)) else {}


class VisionMambaMaps(nn.Module):
    """Image to the maps of some blocks: (B, C, H, W) -> list of (B, D, H', W').

    H' and W' are H and W divided by the stride of the patches and, where the model pads images,
    rounded up. `load_state_dict` takes a state dict of this module and, too, that of a classifier,
    the authors' or ours, for images of any size; blocks and norms that no map needs, the classifier
    and class tokens that are not scanned are left out of it.

    Args:
        model: what computes the maps; it is pruned.
        blocks: indices, negative ones from the last.
        norm: whether the final norm is applied to the maps, instead of the residual stream itself.
        class_token: False takes the class tokens out of the scan; no map has them in either case.

    Raises:
        ValueError: an index out of range, or a norm that `model` no longer has.
    """

    def __init__(
        self,
        model: VisionMamba,
        blocks: Sequence[int] = (-1,),
        norm: bool = False,
        class_token: bool = True,
    ) -> None:
        super().__init__()
        depth = len(model.blocks)
        if len(blocks) == 0 or not all(-depth <= i < depth for i in blocks):
            raise ValueError(
                f"blocks must be indices from {-depth} to {depth - 1}, at least one, got "
                f"{tuple(blocks)}"
            )
        if norm and not isinstance(model.norm, AddNorm):
            raise ValueError("the model's final norm is pruned: norm must be False")
        # As it was trained: what a file says of class tokens is read with this in mind.
        self.cls_token_position = model.cls_token_position
        self.embeds_cls_token = model.num_embedded_cls_tokens > 0 or not model.has_class_token
        if not class_token:
            model.drop_class_tokens()
        self.block_indices = feature_take_indices(depth, list(blocks))[0]
        self.norm = norm
        model.prune_intermediate_layers(self.block_indices, prune_norm=not norm)
        self.model = model
        info = [model.feature_info[i] | {"index": n} for n, i in enumerate(self.block_indices)]
        self.feature_info = FeatureInfo(info, tuple(range(len(info))))
        self.register_load_state_dict_pre_hook(_load_classification_weights)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Choose whether a training step recomputes the blocks' insides to save memory."""
        self.model.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the patterns by which timm groups parameters into layers, for layer decay."""
        return {
            "stem": r"^model\.(?:cls_token|reg_token|pos_embed|patch_embed)",
            "blocks": [(r"^model\.blocks\.(\d+)", None), (r"^model\.norm", (99999,))],
        }  # other parts come after the last block

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the map of each of `blocks`, in the dtype of the weights."""
        take = sorted(set(self.block_indices))
        maps = self.model.forward_intermediates(
            x, take, norm=self.norm, intermediates_only=True, stop_early=True
        )
        dtype = self.model.patch_embed.proj.weight.dtype  # the residual stream may be wider
        by_block = {i: m.to(dtype) for i, m in zip(take, maps, strict=True)}
        return [by_block[i] for i in self.block_indices]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.maps(x)


def _load_classification_weights(
    module: VisionMambaMaps, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Fit a classifier's weights, where `state_dict` has them, to the pruned model."""
    weights = _classification_weights(state_dict, prefix)
    if not weights:
        return
    for name in weights:
        del state_dict[prefix + name]
    if is_official(weights):
        weights = to_native(weights, _position_in_file(module, weights))
    if "cls_token" in weights and not module.model.has_class_token:
        count = weights.pop("cls_token").shape[1]
        if "pos_embed" in weights and module.embeds_cls_token:
            weights["pos_embed"] = weights["pos_embed"][:, count:]
    for name, value in weights.items():
        block = _BLOCK.match(name)
        pruned = (
            name.startswith("head.")
            or (name.startswith("norm.") and not module.norm)
            or (block is not None and int(block[1]) >= len(module.model.blocks))
        )
        if not pruned:
            state_dict[prefix + name] = value
    pass_on_classification_weights(module, state_dict, prefix, "model")


def _position_in_file(module: VisionMambaMaps, weights: dict[str, Tensor]) -> str:
    """Return where the class tokens of the authors' file stand in its position embedding."""
    if not module.embeds_cls_token:
        return "none"
    if "cls_token_head" in weights:
        return "both_ends"
    if "cls_token" not in weights:
        return "none"
    known = module.cls_token_position
    return known if known in ("first", "last") else "middle"  # as in all published files


class VisionMambaPyramid(VisionMambaMaps):
    """Image to maps of strides 4, 8, 16 and 32: (B, C, H, W) -> list of (B, D, H / s, W / s).

    The maps of four blocks, evenly spaced, are rescaled: by transposed convolutions to a finer
    grid, by max pooling to a coarser one. Sizes are rounded up, as a convolutional network's are.
    What `timm.create_model("vim_tiny_patch16_224_pyramid", features_only=True)` returns.

    Args:
        model: see `VisionMambaMaps`; its patches are square and do not overlap.
        out_indices: which of the four levels; or the last n.
        blocks: the block of each level, four of them; None spaces them evenly.
        norm, class_token: see `VisionMambaMaps`.
        output_stride: 8 or 16 lets no level be coarser, for decoders that ask a convolutional
            network to dilate; None is 32.

    Raises:
        ValueError: an argument out of its range, saying what is allowed.
    """

    def __init__(
        self,
        model: VisionMamba,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        blocks: Sequence[int] | None = None,
        norm: bool = False,
        class_token: bool = True,
        output_stride: int | None = None,
    ) -> None:
        patch_size, patch_stride = model.patch_embed.patch_size, model.patch_embed.patch_stride
        patch = patch_size[0]
        if patch_size != patch_stride or patch_size != (patch, patch) or patch & (patch - 1):
            raise ValueError(
                "a pyramid needs square patches that do not overlap and whose side is a power of "
                f"two, got patch_size={patch_size}, patch_stride={patch_stride}: use a "
                "vim_*_patch16_224_pyramid"
            )
        if output_stride not in (None, 8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16, 32 or None, got {output_stride}")
        if isinstance(out_indices, int):
            out_indices = range(-out_indices, 0)
        if len(out_indices) == 0 or not all(-4 <= i < 4 for i in out_indices):
            raise ValueError(
                "a pyramid has four levels, of strides 4, 8, 16 and 32: out_indices must be from "
                f"-4 to 3, at least one, got {tuple(out_indices)}"
            )
        levels = [i % 4 for i in out_indices]
        if len(set(levels)) < len(levels):
            raise ValueError(f"out_indices must name each level once, got {tuple(out_indices)}")
        if blocks is None:
            blocks = [math.ceil(len(model.blocks) * n / 4) - 1 for n in (1, 2, 3, 4)]
        if len(blocks) != 4:
            raise ValueError(f"blocks must be four indices, one a level, got {tuple(blocks)}")
        super().__init__(model, [blocks[i] for i in levels], norm, class_token)
        dim = model.embed_dim
        strides = [min(stride, output_stride or 32) for stride in STRIDES]
        self.strides = [strides[i] for i in levels]
        like = model.patch_embed.proj.weight
        self.levels = nn.ModuleDict({str(i): rescaling(dim, patch, strides[i]) for i in levels})
        self.levels.to(device=like.device, dtype=like.dtype)
        self.feature_info = FeatureInfo(
            [
                {"module": f"levels.{i}", "num_chs": dim, "reduction": strides[i], "index": i}
                for i in range(4)
            ],
            tuple(levels),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[2:]
        features = []
        for level, stride, y in zip(self.levels.values(), self.strides, self.maps(x), strict=True):
            # Patches may reach beyond the image.
            y = level(y)[:, :, : math.ceil(height / stride), : math.ceil(width / stride)]
            features.append(y)
        return features


def rescaling(dim: int, patch: int, stride: int) -> nn.Module:
    """Maps of one stride to those of another: (B, D, H / patch, ...) -> (B, D, H / stride, ...)."""
    if stride > patch:
        return nn.MaxPool2d(stride // patch, ceil_mode=True)
    layers: list[nn.Module] = []
    for _ in range(int(math.log2(patch // stride))):
        if layers:
            layers += [nn.BatchNorm2d(dim), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, dim, 2, stride=2))
    return nn.Sequential(*layers)  # nothing, where the strides are the same


default_cfgs = generate_default_cfgs(
    {
        f"vim_{size}_patch16_224_pyramid.in1k": _cfg(hub, file, fixed_input_size=False)
        for size, hub, file in (
            ("tiny", _TINY, "vim_t_midclstok_76p1acc.pth"),
            ("small", _SMALL, "vim_s_midclstok_80p5acc.pth"),
            ("base", _BASE, "vim_b_midclstok_81p9acc.pth"),
        )
    }
)


def _create(
    variant: str, pretrained: bool, preset: dict, kwargs: dict
) -> VisionMamba | VisionMambaPyramid:
    """Build a classifier of images of any size; with `features_only=True` a pyramid on it."""
    feature_cfg = {
        "feature_cls": VisionMambaPyramid,
        "out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)),
    }
    if kwargs.get("features_only"):
        # class_token, too: the pyramid drops it after weights that know it are loaded.
        for option in ("blocks", "norm", "class_token", "output_stride"):
            if option in kwargs:
                feature_cfg[option] = kwargs.pop(option)
    return build_model_with_cfg(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **({"dynamic_img_size": True, "dynamic_img_pad": True} | preset | kwargs),
    )


@register_model
def vim_tiny_patch16_224_pyramid(
    pretrained: bool = False, **kwargs
) -> VisionMamba | VisionMambaPyramid:
    """Vim-Ti for dense prediction: images of any size, a pyramid with features_only=True."""
    return _create("vim_tiny_patch16_224_pyramid", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_small_patch16_224_pyramid(
    pretrained: bool = False, **kwargs
) -> VisionMamba | VisionMambaPyramid:
    """Vim-S for dense prediction: images of any size, a pyramid with features_only=True."""
    return _create("vim_small_patch16_224_pyramid", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_base_patch16_224_pyramid(
    pretrained: bool = False, **kwargs
) -> VisionMamba | VisionMambaPyramid:
    """Vim-B for dense prediction: images of any size, a pyramid with features_only=True."""
    return _create("vim_base_patch16_224_pyramid", pretrained, {"embed_dim": 768}, kwargs)
