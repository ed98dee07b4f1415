"""Running the blocks of a model with all that they leave behind, and in chunks of a stream.

The contracts stand in `VisionMamba`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor

from vim.layers import MixtureOfExperts, VimBlock

from .outputs import MambaCache, VisionMambaOutput

if TYPE_CHECKING:
    from .vision_mamba import VisionMamba

__all__ = ["forward_outputs", "read_class_token", "scan", "step"]


def forward_outputs(
    model: VisionMamba, x: Tensor, output_hidden_states: bool, use_cache: bool
) -> VisionMambaOutput:
    if use_cache and not any(_has_state(block) for block in model.blocks):
        raise ValueError(
            f"no block has a state to return, {_why_not(0, model.blocks[0])}; "
            "use_cache needs mixers of one direction, 'mamba' or 'causal_mamba2'"
        )
    size = (x.shape[2], x.shape[3])
    x, residual = model._embed(x), None
    found, states = [], []
    for block in model.blocks:
        if use_cache and _has_state(block):
            x, residual, stream, state = _run(model, block.scan, x, residual, None)
        else:
            x, residual, stream = _run(model, block, x, residual)
            state = (None, None)
        found.append(stream)
        states.append(state)
    x, _ = model.norm(model.drop_path(x), residual)
    last, hidden, cache = model.token_order.separate(x), None, None
    if output_hidden_states:
        hidden = (*(model.token_order.separate(stream) for stream in found), last)
    if use_cache:
        follows = _obstacle(model) is None and model.num_prefix_tokens == 0
        if model.pos_embed is not None:  # which for other images is another one
            follows = follows and size == model.patch_embed.img_size
        patches = math.prod(model.patch_embed.dynamic_feat_size(size))
        cache = _cache(states, patches if follows else None)
    return VisionMambaOutput(last, hidden, cache)


def scan(model: VisionMamba, x: Tensor, cache: MambaCache | None) -> tuple[Tensor, MambaCache]:
    if cache is None:
        obstacle = _obstacle(model)
        if obstacle is not None:
            raise ValueError(f"this model cannot read a stream: {obstacle}")
        read, states = 0, [None] * len(model.blocks)
    else:
        read, states = _unpack(model, cache)
    patches = model.patch_embed.embed_chunk(x)
    tokens = model.pos_drop(model.patch_drop(_add_positions(model, patches, x, read)))
    tokens, states = _scan_blocks(model, tokens, states)
    return tokens, _cache(states, read + patches.shape[1])


def step(model: VisionMamba, x: Tensor, cache: MambaCache | None) -> tuple[Tensor, MambaCache]:
    size = model.patch_embed.patch_size
    if tuple(x.shape[2:]) != size:
        raise ValueError(
            f"a step takes one patch of {size[0]}x{size[1]} pixels, got {list(x.shape)}: use scan "
            "for more"
        )
    tokens, cache = scan(model, x, cache)
    return tokens.squeeze(1), cache


def read_class_token(model: VisionMamba, cache: MambaCache) -> Tensor:
    if model.cls_token is None:
        raise ValueError(
            "there is no class token to read: pool the patches that scan returns, or build the "
            "model with cls_token_position='last'"
        )
    _, states = _unpack(model, cache)
    token = model.cls_token
    if model.pos_embed is not None and model.num_embedded_cls_tokens > 0:
        token = token + model.pos_embed[:, : model.num_embedded_cls_tokens]
    token = model.pos_drop(token.expand(cache.ssm_states[0].shape[0], -1, -1))
    return _scan_blocks(model, token, states)[0]


def _run(model: VisionMamba, function, *arguments):
    return checkpoint(function, *arguments) if model.grad_checkpointing else function(*arguments)


def _scan_blocks(model: VisionMamba, x: Tensor, states: list) -> tuple[Tensor, list]:
    """Return the normed tokens, and the states after them."""
    residual, after = None, []
    for block, state in zip(model.blocks, states, strict=True):
        x, residual, _, state = _run(model, block.scan, x, residual, state)
        after.append(state)
    return model.norm(model.drop_path(x), residual)[0], after


def _cache(states: list[tuple], patches: int | None) -> MambaCache:
    conv_states, ssm_states = zip(*states, strict=True)
    return MambaCache(list(conv_states), list(ssm_states), patches)


def _unpack(model: VisionMamba, cache: MambaCache) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """Return how many patches the cache has read, and the states of the blocks."""
    if cache.patches is None:
        raise ValueError(
            "this cache is to be looked at alone: it has read more than patches, or the model "
            "cannot read a stream; start with cache=None"
        )
    if len(cache.ssm_states) != len(model.blocks):
        raise ValueError(
            f"the cache is of a model of {len(cache.ssm_states)} blocks, this one has "
            f"{len(model.blocks)}"
        )
    return cache.patches, list(zip(cache.conv_states, cache.ssm_states, strict=True))


def _add_positions(model: VisionMamba, patches: Tensor, x: Tensor, read: int) -> Tensor:
    """(B, M, D) patches of the chunk x, of a stream that has `read` before -> (B, M, D)."""
    if model.pos_embed is None:
        return patches
    rows, columns = model.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
    width = model.patch_embed.grid_size[1]
    if rows > 1 and columns != width:
        raise ValueError(
            f"a chunk of {rows}x{columns} patches has no places in a position embedding whose rows "
            f"have {width}: give chunks of whole rows or of a part of one, or build the model with "
            "pos_embed='none'"
        )
    pos_embed = model.pos_embed[:, model.num_embedded_cls_tokens :]
    place = torch.arange(read, read + patches.shape[1], device=patches.device)
    return patches + pos_embed[:, place % pos_embed.shape[1]]


def _obstacle(model: VisionMamba) -> str | None:
    """Return why a model cannot read a stream; None where it can."""
    for i, block in enumerate(model.blocks):
        if not _has_state(block) or getattr(block.mixer, "reverse", False):
            return (
                f"{_why_not(i, block)}; mixers have to be 'mamba' or 'causal_mamba2', not reversed"
            )
        layer = getattr(block.ffn, "layer", None)
        if isinstance(layer, MixtureOfExperts) and not layer.has_place_for_all():
            return (
                f"the experts of block {i} have so many places for a sequence, which depends on "
                "its end: let the capacity factors be num_experts / top_k = "
                f"{layer.num_experts / layer.top_k:g} at least"
            )
    if model.cls_token_position not in ("none", "last") or model.num_reg_tokens:
        return (
            f"where {model.num_cls_tokens} class token(s) at {model.cls_token_position!r} and "
            f"{model.num_reg_tokens} register(s) stand depends on how many patches are to come, or "
            "they would have read none; a class token may be 'last' or 'none', without registers"
        )
    return None


def _has_state(block: VimBlock) -> bool:
    return hasattr(block.mixer, "scan")


def _why_not(index: int, block: VimBlock) -> str:
    """Return why a block cannot be given one token after another."""
    kind = type(block.mixer).__name__
    if _has_state(block):
        return f"the mixer of block {index}, {kind}, reads from the last token, still to come"
    return (
        f"the mixer of block {index}, {kind}, gives for a token what depends on tokens still to "
        "come, and has no scan"
    )
