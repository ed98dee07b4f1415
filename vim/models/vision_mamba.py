"""Vision Mamba: the model, its presets and their registration with timm.

Source: Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional
State Space Model", arXiv:2401.09417.

Size letters: B batch, M patches, P prefix tokens, L = P + M tokens, D embed_dim.
"""

import math
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    PatchDropout,
    global_pool_nlc,
    lecun_normal_,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
)
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vim.layers import (
    EMBED_LAYERS,
    Add,
    AddNorm,
    Component,
    FeedForward,
    TokenOrder,
    VimBlock,
    build_ffns,
    build_mixers,
)
from vim.ops.block_sequence import BlockSequence, TrainingSequence

from . import _streaming
from ._checkpoint import checkpoint_filter_fn, load_state_dict_pre_hook
from .outputs import MambaCache, VisionMambaOutput

__all__ = ["VisionMamba"]

POOLS = ("", "token", "avg", "max")


class VisionMamba(nn.Module):
    """Image to class logits with a stack of bidirectional Mamba blocks: (B, C, H, W) -> (B, K).

    It speaks the interface of timm's `VisionTransformer`. Where class and register tokens stand
    while scanning is private: tokens that go in or out come as class tokens, registers, patches.

    Args:
        img_size: side or (height, width) of the images.
        patch_size: side or (height, width) of a patch.
        patch_stride: distance of neighbouring patches; None is the patch size.
        embed_layer: "patch" for one convolution, see `PatchEmbed`; "conv" for a convolutional stem,
            see `ConvStem`.
        in_chans: channels of the images.
        num_classes: K; 0 gives the pooled features themselves.
        global_pool: "token" (the class token; the mean of two), "avg" or "max" over the patches,
            or "" for all tokens, unpooled.
        embed_dim: D.
        depth: number of blocks.
        mixer: what mixes the tokens of a block: a name of `vim.layers.MIXERS`, a dict of a name and
            options (`{"name": "mamba2", "d_state": 128}`) or a function of dim, device and dtype;
            or a list of such, one for each block.
        ffn: the feed-forward behind it, of `vim.layers.FFNS`, in the same forms.
        d_state, d_conv, expand, dt_rank, merge, norm_after_scan, keep_states: of the mixer
            "bimamba"; see `BidirectionalMamba`.
        norm_layer: "rms" or "layer".
        norm_eps: added to the mean square or the variance.
        class_token: False is the same as `cls_token_position="none"`.
        cls_token_position: where among the patches it is scanned, see `TokenOrder`.
        reg_tokens, reg_token_position: registers, see `TokenOrder`.
        pos_embed: "learned" or "none".
        no_embed_class: whether class tokens go without position embedding; registers always do.
        dynamic_img_size: whether images of any size are taken, by resampling the position
            embedding at every call.
        dynamic_img_pad: whether images that patches do not cover exactly are padded.
        strict_img_size: whether an image of another size than `img_size` is refused; without it
            (and without `dynamic_img_size`) other shapes of as many patches are taken.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position embedding.
        patch_drop_rate: share of the patches that is left out in training.
        drop_path_rate: stochastic depth, growing linearly with the blocks.

    Raises:
        ValueError: an argument out of its range, saying what is allowed.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        patch_stride: int | tuple[int, int] | None = None,
        embed_layer: Literal["patch", "conv"] = "patch",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "token", "avg", "max"] = "token",
        embed_dim: int = 192,
        depth: int = 24,
        mixer: Component | Sequence[Component] = "bimamba",
        ffn: Component | Sequence[Component] = "none",
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        merge: Literal["mean", "sum"] = "mean",
        norm_after_scan: bool = False,
        keep_states: bool = False,
        norm_layer: Literal["rms", "layer"] = "rms",
        norm_eps: float = 1e-5,
        class_token: bool = True,
        cls_token_position: Literal["none", "first", "middle", "last", "both_ends"] = "middle",
        reg_tokens: int = 0,
        reg_token_position: Literal["even", "middle"] = "even",
        pos_embed: Literal["learned", "none"] = "learned",
        no_embed_class: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        strict_img_size: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if pos_embed not in ("learned", "none"):
            raise ValueError(f"pos_embed must be 'learned' or 'none', got {pos_embed!r}")
        if embed_layer not in EMBED_LAYERS:
            allowed = ", ".join(EMBED_LAYERS)
            raise ValueError(f"embed_layer must be one of {allowed}, got {embed_layer!r}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if not class_token:
            cls_token_position = "none"
        self.cls_token_position = cls_token_position
        self.token_order = TokenOrder(cls_token_position, reg_tokens, reg_token_position)
        self.num_prefix_tokens = self.token_order.num_prefix_tokens
        self.num_cls_tokens = self.token_order.num_cls_tokens
        self.num_reg_tokens = reg_tokens
        self.reg_token_position = reg_token_position
        self.has_class_token = self.num_cls_tokens > 0
        self._check_pool(global_pool)
        self.global_pool = global_pool
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        self.patch_embed = EMBED_LAYERS[embed_layer](
            img_size,
            patch_size,
            patch_stride,
            in_chans,
            embed_dim,
            strict_img_size=strict_img_size and not dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            **dd,
        )
        self.cls_token = self._tokens(self.num_cls_tokens, dd)
        self.reg_token = self._tokens(reg_tokens, dd)
        self.num_embedded_cls_tokens = 0 if no_embed_class else self.num_cls_tokens
        embedded = self.num_embedded_cls_tokens + self.patch_embed.num_patches
        self.pos_embed = self._tokens(embedded if pos_embed == "learned" else 0, dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = (
            PatchDropout(patch_drop_rate, num_prefix_tokens=0, ordered=True)
            if patch_drop_rate > 0
            else nn.Identity()
        )

        # A block drops what the block before it computed, so the rates stand one block later.
        step = drop_path_rate / max(depth - 1, 1)
        rates = [0.0, *(step * i for i in range(depth))]
        bimamba = {
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "dt_rank": dt_rank,
            "merge": merge,
            "norm_after_scan": norm_after_scan,
            "keep_states": keep_states,
        }
        mixers = build_mixers(mixer, depth, embed_dim, bimamba, **dd)
        ffns = build_ffns(ffn, depth, embed_dim, **dd)
        norm = partial(AddNorm, embed_dim, norm_eps, norm_layer, **dd)
        self.blocks = nn.ModuleList(
            VimBlock(
                norm(),
                mixers[i],
                rates[i],
                None if ffns[i] is None else FeedForward(norm(), ffns[i], rates[i + 1]),
            )
            for i in range(depth)
        )
        self.drop_path = DropPath(rates[depth]) if rates[depth] > 0 else nn.Identity()
        self.norm = norm()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(num_classes, dd)

        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction}
            for i in range(depth)
        ]
        self.register_load_state_dict_pre_hook(load_state_dict_pre_hook)
        self._init_new_weights()

    def _tokens(self, count: int, dd: dict) -> nn.Parameter | None:
        return nn.Parameter(torch.empty(1, count, self.embed_dim, **dd)) if count else None

    def _classifier(self, num_classes: int, dd: dict) -> nn.Module:
        return nn.Linear(self.embed_dim, num_classes, **dd) if num_classes else nn.Identity()

    def _check_pool(self, global_pool: str) -> None:
        if global_pool not in POOLS:
            raise ValueError(
                f"global_pool must be one of {', '.join(map(repr, POOLS))}, got {global_pool!r}"
            )
        if global_pool == "token" and not self.has_class_token:
            raise ValueError(
                "global_pool='token' needs a class token: choose a cls_token_position other than "
                "'none', or global_pool='avg'"
            )

    @torch.jit.ignore
    def init_weights(self, mode: str = "") -> None:
        """Draw every weight anew, as the authors do.

        Args:
            mode: "" is the only one; timm's ViTs have others here.
        """
        if mode:
            raise ValueError(f"the only mode of initialisation is '', got {mode!r}")
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self._init_new_weights()

    def _init_new_weights(self) -> None:
        """Draw what modules do not draw for themselves, or draw otherwise than Vim asks."""
        for tokens in (self.cls_token, self.reg_token, self.pos_embed):
            if tokens is not None:
                trunc_normal_(tokens, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        additions = sum(isinstance(m, VimBlock | FeedForward) for m in self.modules())
        for block in self.blocks:
            _init_block(block, additions)
        self._init_head()

    def _init_head(self) -> None:
        if self.num_classes:
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm.

        `A_log` is among them, as its authors mean it; official Vim training decays it all the
        same, because timm never saw the mark on the parameter.
        """
        exempt = {"pos_embed", "cls_token", "reg_token"}
        ends = (".A_log", ".A_imag", ".D", ".dt_bias")
        return exempt | {n for n, _ in self.named_parameters() if n.endswith(ends)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the patterns by which timm groups parameters into layers, for layer decay."""
        return {
            "stem": r"^cls_token|^reg_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Choose whether a training step recomputes the blocks' insides to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier, and perhaps another pooling."""
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.patch_embed.proj.weight
        self.head = self._classifier(num_classes, {"device": like.device, "dtype": like.dtype})
        self._init_head()

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        patch_stride: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the size of images, patches or strides, resampling what depends on it."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size, patch_stride)
        if self.pos_embed is not None:
            pos_embed = resample_abs_pos_embed(
                self.pos_embed.detach(),
                list(self.patch_embed.grid_size),
                list(old_grid),
                num_prefix_tokens=self.num_embedded_cls_tokens,
            )
            self.pos_embed = nn.Parameter(pos_embed, self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()

    @torch.jit.ignore
    def drop_class_tokens(self) -> None:
        """Take the class tokens out, for good: the scan then reads patches and registers alone.

        For dense prediction from weights that were trained with a class token. Pooling by "token"
        becomes "avg".
        """
        if self.pos_embed is not None:
            patches = self.pos_embed.detach()[:, self.num_embedded_cls_tokens :].clone()
            self.pos_embed = nn.Parameter(patches, self.pos_embed.requires_grad)
        self.token_order = TokenOrder("none", self.num_reg_tokens, self.reg_token_position)
        self.cls_token = None
        self.cls_token_position = "none"
        self.has_class_token = False
        self.num_cls_tokens = self.num_embedded_cls_tokens = 0
        self.num_prefix_tokens = self.token_order.num_prefix_tokens
        if self.global_pool == "token":
            self.global_pool = "avg"

    def _embed(self, x: Tensor) -> Tensor:
        """Image to tokens in the order of the scan: (B, C, H, W) -> (B, P + M, D)."""
        size = x.shape[2:]
        x = self.patch_embed(x)
        prefix = self.cls_token
        if self.pos_embed is not None:
            pos_embed = self.pos_embed
            if self.dynamic_img_size:
                grid = self.patch_embed.dynamic_feat_size((size[0], size[1]))
                pos_embed = resample_abs_pos_embed(
                    pos_embed,
                    [grid[0], grid[1]],
                    self.patch_embed.grid_size,
                    num_prefix_tokens=self.num_embedded_cls_tokens,
                )
            elif not self.patch_embed.strict_img_size:
                _check_patches(x, pos_embed.shape[1] - self.num_embedded_cls_tokens)
            x = x + pos_embed[:, self.num_embedded_cls_tokens :]
            if prefix is not None and self.num_embedded_cls_tokens > 0:
                prefix = prefix + pos_embed[:, : self.num_embedded_cls_tokens]
        x = self.patch_drop(x)
        if self.reg_token is not None:
            reg_token = self.reg_token
            prefix = reg_token if prefix is None else torch.cat([prefix, reg_token], dim=1)
        if prefix is not None:
            x = self.token_order.interleave(prefix.expand(x.shape[0], -1, -1), x)
        return self.pos_drop(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normed tokens, prefix tokens first: (B, C, H, W) -> (B, P + M, D)."""
        if not torch.jit.is_scripting():  # noqa: SIM102, since TorchScript would compile the rest
            if _in_plain_python(x):
                return self._plain_features(x)
        x = self._embed(x)
        residual: Tensor | None = None
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, residual, _ = checkpoint(block, x, residual)
            else:
                x, residual, _ = block(x, residual)
        x, _ = self.norm(self.drop_path(x), residual)
        return self.token_order.separate(x)

    @torch.jit.ignore
    def _plain_features(self, x: Tensor) -> Tensor:
        """Return what `forward_features` does, in less of the host's time; without gradients in
        less memory, too, see `VimBlock.run`."""
        flow = [self._embed(x), None]
        run_blocks = self._run_blocks if torch.is_grad_enabled() else self._infer_blocks
        run_blocks(flow, self.blocks, ())
        x, _ = self.norm(self.drop_path(flow[0]), flow[1])
        return self.token_order.separate(x)

    @torch.jit.ignore
    def _infer_blocks(
        self, flow: list[Tensor | None], blocks: Sequence[nn.Module], take: Collection[int]
    ) -> list[Tensor]:
        """`_run_blocks` without gradients, in less memory and less of the host's time."""
        streams = []
        sequence = BlockSequence(flow[0]) if BlockSequence.serves(flow[0]) else None
        for i, block in enumerate(blocks):
            if type(block) is VimBlock and i - 1 not in take:
                block.run(flow, sequence)
                continue
            *flow[:], found = block(*flow)
            if i - 1 in take:
                streams.append(found)
            if sequence is not None:
                sequence.keep()
        return streams

    def _run_blocks(
        self, flow: list[Tensor | None], blocks: Sequence[nn.Module], take: Collection[int]
    ) -> list[Tensor]:
        """Replace [tokens, stream] by those after the blocks; return the streams after some.

        Args:
            take: indices of blocks. The stream after a block is what the next one finds; that after
                the last of all is not returned.
        """
        streams = []
        plain = torch.is_grad_enabled() and _in_plain_python(flow[0])
        serves = plain and TrainingSequence.serves(flow[0])
        sequence = TrainingSequence(flow[0]) if serves else None
        for i, block in enumerate(blocks):
            if self.grad_checkpointing:
                *flow[:], found = checkpoint(block, *flow)
            elif sequence is not None and type(block) is VimBlock:
                *flow[:], found = block.train_in(sequence, *flow)
            else:
                *flow[:], found = block(*flow)
            if i - 1 in take:
                streams.append(found)
        return streams

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Return the pooled tokens: (B, P + M, D) -> (B, D), or all of them for ""."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if pool_type == "token":
            if self.num_cls_tokens == 0:
                raise ValueError("there is no class token to pool")
            return x[:, : self.num_cls_tokens].mean(dim=1)
        return global_pool_nlc(x, pool_type, num_prefix_tokens=self.num_prefix_tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of normed tokens, or what the classifier would see."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Tensor | list[Tensor]]:
        """Return the features after some of the blocks, and those after all.

        A block's feature is the residual stream after it, float32 at least.

        Args:
            x: (B, C, H, W) images.
            indices: the last n blocks, or a list of blocks; None is all.
            return_prefix_tokens: whether each feature comes as (patches, prefix tokens).
            norm: whether the final norm is applied to each.
            stop_early: whether the blocks after the last one asked for are left out.
            output_fmt: "NCHW" maps (B, D, H', W') or "NLC" tokens (B, M, D).
            intermediates_only: whether only the features of blocks are returned.
            output_dict: whether to return a dict, as timm does: "image_features",
                "image_intermediates" and "image_intermediates_prefix".

        Returns:
            (what forward_features returns, list of features), or the list, or the dict.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        size = x.shape[2:]
        blocks = self.blocks[: last + 1] if stop_early else self.blocks
        run_blocks = self._infer_blocks if _in_plain_inference(x) else self._run_blocks
        flow = [self._embed(x), None]
        grid = self.patch_embed.dynamic_feat_size((size[0], size[1]))
        streams = run_blocks(flow, blocks, take)
        x, residual = flow
        final, residual = self.norm(self.drop_path(x), residual)
        if len(blocks) - 1 in take:
            streams.append(residual)
        if norm:
            streams = [self.norm(s, None)[0].to(final.dtype) for s in streams]
        features = [self.token_order.separate(s) for s in streams]
        final = self.token_order.separate(final)

        prefixes = [f[:, : self.num_prefix_tokens] for f in features]
        features = [f[:, self.num_prefix_tokens :] for f in features]
        if output_fmt == "NCHW":
            features = [f.transpose(1, 2).unflatten(2, grid).contiguous() for f in features]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result = {"image_intermediates": features}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = final
            return result
        if with_prefix:
            features = list(zip(features, prefixes, strict=True))
        return features if intermediates_only else (final, features)

    @torch.jit.ignore
    def forward_outputs(
        self, x: Tensor, output_hidden_states: bool = False, use_cache: bool = False
    ) -> VisionMambaOutput:
        """Return the final tokens, and on request those between the blocks and the mixers' states.

        It stands for the `model(x, output_hidden_states=True, return_dict=True)` of transformers:
        `forward` keeps timm's signature.

        Args:
            x: (B, C, H, W) images.
            output_hidden_states: whether to return what each block reads.
            use_cache: whether to return the states of mixers of one direction after the scan.

        Raises:
            ValueError: `use_cache` for a model without a mixer of one direction.
        """
        return _streaming.forward_outputs(self, x, output_hidden_states, use_cache)

    @torch.jit.ignore
    def scan(self, x: Tensor, cache: MambaCache | None = None) -> tuple[Tensor, MambaCache]:
        """Return the patches of a chunk of a stream of images, and what is remembered after it.

        A model whose mixers all read from the first token to the last ("mamba", "causal_mamba2")
        takes a stream without end, chunk by chunk, in memory of constant size. What it gives is
        what it would give for the patches of all chunks as one sequence, those of a chunk row by
        row: an image in bands of whole rows gives what the whole image does, and the frames of a
        video are read one after the other. Differentiable in the cache, too; `MambaCache.detach`
        cuts the graph.

        The class token is none or the last, which stands behind all patches: `read_class_token`.
        A learned position embedding starts again after each `img_size` of patches (for a larger
        one `set_input_size` resamples it); without one (`pos_embed="none"`) chunks have any shape.

        Args:
            x: (B, C, h, w) pixels; patches cover them exactly.
            cache: what the call for the chunk before has returned; None at the start.

        Returns:
            (B, M, D) normed patches, and the cache, which is a new one.

        Raises:
            ValueError: a model that cannot, or a chunk that does not fit, saying why.
        """
        return _streaming.scan(self, x, cache)

    @torch.jit.ignore
    def step(self, x: Tensor, cache: MambaCache | None = None) -> tuple[Tensor, MambaCache]:
        """Return the normed token of one patch, and the cache after it: `scan` with M = 1.

        Args:
            x: (B, C, h, w), the pixels of one patch.
            cache: see `scan`.

        Returns:
            (B, D), and the cache.

        Raises:
            ValueError: see `scan`.
        """
        return _streaming.step(self, x, cache)

    @torch.jit.ignore
    def read_class_token(self, cache: MambaCache) -> Tensor:
        """Return the normed class token behind all that `cache` remembers: (B, 1, D).

        `forward_head` makes logits of it. The stream can go on: the cache stays as it is.

        Raises:
            ValueError: a model without a class token in the last place.
        """
        return _streaming.read_class_token(self, cache)

    @torch.jit.ignore
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] | tuple[int, ...] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor]:
        """Return the features after some blocks, by DINO's interface to the same."""
        return self.forward_intermediates(
            x,
            n if isinstance(n, int) else list(n),
            return_prefix_tokens,
            norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the blocks after the last of `indices`; return the indices that are kept."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = Add()
        if prune_head:
            self.reset_classifier(0, "")
        return take


@torch.no_grad()
def _init_block(block: VimBlock, additions: int) -> None:
    """Draw the projections of a block, of so many that add to the stream, each scaled down."""
    # Components of a user's own may have projections by other names, and then keep their weights.
    in_proj = getattr(block.mixer, "in_proj", None)
    out_proj = getattr(block.mixer, "out_proj", None)
    if out_proj is not None:
        nn.init.kaiming_uniform_(out_proj.weight, a=math.sqrt(5))
        out_proj.weight /= math.sqrt(additions)
    for linear in (in_proj, out_proj):
        if linear is not None and linear.bias is not None:
            nn.init.zeros_(linear.bias)
    if isinstance(block.ffn, FeedForward) and hasattr(block.ffn.layer, "fc2"):
        block.ffn.layer.fc2.weight /= math.sqrt(additions)


def _in_plain_inference(x: Tensor) -> bool:
    """Whether nobody wants gradients, and nobody but Python runs the model."""
    return not torch.is_grad_enabled() and _in_plain_python(x)


def _in_plain_python(x: Tensor) -> bool:
    """Whether nobody compiles, exports or traces the model."""
    traced = isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()
    return not (torch.compiler.is_compiling() or traced)


def _check_patches(x: Tensor, expected: int) -> None:
    """Raise where there are more or fewer patches than position embeddings."""
    if x.shape[1] != expected:
        raise ValueError(
            f"the image has {x.shape[1]} patches, the position embedding {expected}: resize the "
            "image, call set_input_size, or build the model with dynamic_img_size=True"
        )


def _cfg(hf_hub_id: str = "", hf_hub_filename: str = "", **kwargs) -> dict:
    cfg = {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    if hf_hub_id:
        cfg |= {
            "hf_hub_id": hf_hub_id,
            "hf_hub_filename": hf_hub_filename,
            "license": "apache-2.0",
            "paper_ids": "arXiv:2401.09417",
            "paper_name": "Vision Mamba: Efficient Visual Representation Learning with "
            "Bidirectional State Space Model",
            "origin_url": "https://github.com/hustvl/Vim",
        }
    return cfg | kwargs


_TINY, _SMALL, _BASE = (f"hustvl/Vim-{size}-midclstok" for size in ("tiny", "small", "base"))
_IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_AT_384 = {"input_size": (3, 384, 384), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.in1k": _cfg(_TINY, "vim_t_midclstok_76p1acc.pth"),
        "vim_small_patch16_224.in1k": _cfg(_SMALL, "vim_s_midclstok_80p5acc.pth"),
        "vim_base_patch16_224.in1k": _cfg(_BASE, "vim_b_midclstok_81p9acc.pth"),
        "vim_tiny_patch16_stride8_224.in1k": _cfg(_TINY, "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small_patch16_stride8_224.in1k": _cfg(_SMALL, "vim_s_midclstok_ft_81p6acc.pth"),
        "vim_tiny_patch16_384.untrained": _cfg(**_AT_384),
        "vim_small_patch16_384.untrained": _cfg(**_AT_384),
        "vim_base_patch16_384.untrained": _cfg(**_AT_384),
        "vim_micro_patch8_128.imagenette": _cfg(
            file=str(
                Path(__file__).parent / "weights" / "vim_micro_patch8_128.imagenette.safetensors"
            ),
            input_size=(3, 128, 128),
            crop_pct=0.875,
            num_classes=10,
            first_conv="patch_embed.stem.0.conv",
            label_names=tuple(_IMAGENETTE),
            label_descriptions=_IMAGENETTE,
            license="other",
            description="Trained from scratch on Imagenette by this project; for research only, "
            "see the card beside the weights",
        ),
    }
)


def _create(variant: str, pretrained: bool, preset: dict, kwargs: dict) -> VisionMamba:
    return build_model_with_cfg(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **(preset | kwargs),
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-Ti: 7 M parameters, 197 tokens at 224 px."""
    return _create("vim_tiny_patch16_224", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-S: 26 M parameters, 197 tokens at 224 px."""
    return _create("vim_small_patch16_224", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-B: 98 M parameters, 197 tokens at 224 px."""
    return _create("vim_base_patch16_224", pretrained, {"embed_dim": 768}, kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-Ti+: Vim-Ti on overlapping patches, 730 tokens at 224 px."""
    preset = {"embed_dim": 192, "patch_stride": 8}
    return _create("vim_tiny_patch16_stride8_224", pretrained, preset, kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-S+: Vim-S on overlapping patches, 730 tokens at 224 px."""
    preset = {"embed_dim": 384, "patch_stride": 8}
    return _create("vim_small_patch16_stride8_224", pretrained, preset, kwargs)


@register_model
def vim_tiny_patch16_384(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-Ti at 384 px: 577 tokens."""
    preset = {"embed_dim": 192, "img_size": 384}
    return _create("vim_tiny_patch16_384", pretrained, preset, kwargs)


@register_model
def vim_small_patch16_384(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-S at 384 px: 577 tokens."""
    preset = {"embed_dim": 384, "img_size": 384}
    return _create("vim_small_patch16_384", pretrained, preset, kwargs)


@register_model
def vim_base_patch16_384(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-B at 384 px: 577 tokens."""
    preset = {"embed_dim": 768, "img_size": 384}
    return _create("vim_base_patch16_384", pretrained, preset, kwargs)


@register_model
def vim_micro_patch8_128(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-micro: 2.9 M parameters, for small data sets; 256 tokens at 128 px.

    A convolutional stem, and the mean of the patches instead of a class token.
    """
    preset = {
        "img_size": 128,
        "patch_size": 8,
        "embed_layer": "conv",
        "embed_dim": 192,
        "depth": 9,
        "dt_rank": 16,  # products of 16-bit matrices want rows of a multiple of 16 bytes
        "class_token": False,
        "global_pool": "avg",
    }
    return _create("vim_micro_patch8_128", pretrained, preset, kwargs)


# The names that the authors' scripts use; timm maps each to ours and says so.
register_model_deprecations(
    __name__,
    {
        f"vim_{size}_{suffix}": f"vim_{size}_{ours}.in1k"
        for size, suffix, ours in (
            (
                "tiny",
                "patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
                "patch16_224",
            ),
            (
                "tiny",
                "patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
                "patch16_stride8_224",
            ),
            (
                "small",
                "patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
                "patch16_224",
            ),
            (
                "small",
                "patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
                "patch16_stride8_224",
            ),
            (
                "base",
                "patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2",
                "patch16_224",
            ),
        )
    },
)
