"""Checkpoints: reading them safely, and the names and layout of the authors' files.

The authors' model keeps two sets of parameters in one mixer, the second with a `_b` in its names,
and lays the position embedding out in the order of the scan, the class token in the middle. Ours
has two branches, and class tokens first. The mapping below is one to one, so that a file converted
there and back is the same to the bit.
"""

import argparse
import math
import os
import pickle
import re
from pathlib import Path

import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from torch import Tensor, nn

from vim.layers import TokenOrder

__all__ = [
    "backbone_weights",
    "checkpoint_filter_fn",
    "is_official",
    "load_checkpoint",
    "load_state_dict_pre_hook",
    "read_checkpoint",
    "save_checkpoint",
    "to_native",
    "to_official",
]

# Names inside an official mixer -> names inside ours; backward_branch takes those with `_b`.
_BRANCH_NAMES = {
    "A{b}_log": "A_log",
    "D{b}": "D",
    "conv1d{b}.weight": "conv1d.weight",
    "conv1d{b}.bias": "conv1d.bias",
    "x_proj{b}.weight": "x_proj.weight",
    "dt_proj{b}.weight": "dt_proj.weight",
    "dt_proj{b}.bias": "dt_bias",
}
_MIXER_NAMES = {
    official.format(b=b): f"{branch}.{native}"
    for official, native in _BRANCH_NAMES.items()
    for b, branch in (("", "forward_branch"), ("_b", "backward_branch"))
}
_TO_NATIVE = {f"mixer.{o}": f"mixer.{n}" for o, n in _MIXER_NAMES.items()}
_TO_OFFICIAL = {n: o for o, n in _TO_NATIVE.items()}
_OFFICIAL_BLOCK = re.compile(r"^layers\.(\d+)\.(.+)$")
_NATIVE_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_SAME_IN_BLOCK = re.compile(r"norm\.(weight|bias)|mixer\.(in|out)_proj\.(weight|bias)")


def read_checkpoint(path: str | os.PathLike, *, use_ema: bool = False) -> dict[str, Tensor]:
    """Return the weights in a checkpoint file, names as they stand there.

    Nothing but tensors and plain data is unpickled; a file that asks for more is refused. The
    `argparse.Namespace` of a training run's options, which the authors' files hold, counts as
    plain data.

    Args:
        path: `.safetensors`, or what torch.save wrote: a state dict, or a dict that holds one
            under `model` or `state_dict`.
        use_ema: whether to take the averaged weights, `model_ema` or `state_dict_ema`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, would run code, or holds no such weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused, because it is damaged or asks to unpickle more than tensors and "
            f"plain data, which can run code: {error}. If you trust it, load it with "
            "torch.load(weights_only=False) and save its state dict as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error

    names = ("model_ema", "state_dict_ema") if use_ema else ("model", "state_dict")
    if isinstance(content, dict):
        name = next((n for n in names if isinstance(content.get(n), dict)), None)
        state_dict = content if name is None else content[name]
        bare = name is None and not use_ema
        if (name or bare) and state_dict and all(map(torch.is_tensor, state_dict.values())):
            return clean_state_dict(state_dict)
    held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    raise ValueError(
        f"{path} holds no weights under {' or '.join(names)}"
        + ("" if use_ema else " and is no state dict itself")
        + f"; it holds: {held[:500]}"
    )


def save_checkpoint(state_dict: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Write weights as `.safetensors`, or as `.pth` under `model`, moved into place when whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state_dict = {k: v.contiguous() for k, v in state_dict.items()}
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(state_dict, temporary, metadata={"format": "pt"})
        elif path.suffix in (".pth", ".pt"):
            torch.save({"model": state_dict}, temporary)
        else:
            raise ValueError(f"the file must end in .safetensors, .pth or .pt, got {path.name}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike, *, use_ema: bool = False, strict: bool = True
):
    """Load a checkpoint, the authors' or ours, into `model`; return load_state_dict's answer.

    Position embeddings are resampled to the model's grid.

    Args:
        model: a `VisionMamba`.
        path, use_ema: see `read_checkpoint`.
        strict: whether every name must match.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`; ValueError also for weights that are
            not finite.
        RuntimeError: names or shapes that do not match; the message says which and what to do.
    """
    return model.load_state_dict(read_checkpoint(path, use_ema=use_ema), strict=strict)


def backbone_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a training run's model by the names that its backbone gives them."""
    if state_dict and all(name.startswith("backbone.") for name in state_dict):
        return {name.removeprefix("backbone."): x for name, x in state_dict.items()}
    return state_dict


def is_official(state_dict: dict[str, Tensor]) -> bool:
    """Whether the names are those of the authors' code."""
    return any(_OFFICIAL_BLOCK.match(key) for key in state_dict)


def to_native(
    state_dict: dict[str, Tensor], cls_token_position: str = "middle"
) -> dict[str, Tensor]:
    """Return weights of the authors' layout in that of `VisionMamba`.

    Args:
        state_dict: the weights.
        cls_token_position: that of the model, which no file tells; see `vim.layers.TokenOrder`.

    Raises:
        ValueError: the file is of a model that this is not (the first version of Vim, with rotary
            embedding and shared branches).
    """
    if any("rope.freqs" in key for key in state_dict):
        raise ValueError(
            "the checkpoint is of the first version of Vim (rotary embedding), which VisionMamba "
            "does not implement: use one of the *_midclstok_* files"
        )
    out = {}
    for key, value in state_dict.items():
        match = _OFFICIAL_BLOCK.match(key)
        if match:
            name = _TO_NATIVE.get(match[2], match[2])
            if name.endswith("conv1d.weight"):
                value = value.squeeze(1)  # (D, 1, K) -> (D, K)
            out[f"blocks.{match[1]}.{name}"] = value
        elif key == "norm_f.weight" or key == "norm_f.bias":
            out[key.replace("norm_f", "norm")] = value
        else:
            out[key] = value
    if "cls_token_head" in out:
        pair = out.pop("cls_token_head"), out.pop("cls_token_tail")
        out["cls_token"] = torch.cat(pair, dim=1)
    if "pos_embed" in out:
        out["pos_embed"] = TokenOrder(cls_token_position).separate(out["pos_embed"])
    return out


def to_official(
    state_dict: dict[str, Tensor], cls_token_position: str = "middle"
) -> dict[str, Tensor]:
    """Return weights of a `VisionMamba` in the authors' layout: undo `to_native`.

    Raises:
        ValueError: the model has what the authors' code has not, such as registers or another
            mixer.
    """
    out, unknown = {}, []
    for key, value in state_dict.items():
        match = _NATIVE_BLOCK.match(key)
        if key == "reg_token" or ".stem." in key:
            unknown.append(key)
        elif match:
            name = _TO_OFFICIAL.get(match[2], match[2])
            if match[2] not in _TO_OFFICIAL and not _SAME_IN_BLOCK.fullmatch(name):
                unknown.append(key)
            if "conv1d" in name and name.endswith("weight"):
                value = value.unsqueeze(1)
            out[f"layers.{match[1]}.{name}"] = value
        elif key in ("norm.weight", "norm.bias"):
            out[key.replace("norm", "norm_f")] = value
        else:
            out[key] = value
    if unknown:
        raise ValueError(f"the authors' layout has no place for {', '.join(unknown)}")
    if "cls_token" in out and out["cls_token"].shape[1] == 2:
        out["cls_token_head"], out["cls_token_tail"] = out.pop("cls_token").split(1, dim=1)
    if "pos_embed" in out:
        order = TokenOrder(cls_token_position)
        cls, patches = out["pos_embed"].tensor_split([order.num_cls_tokens], dim=1)
        out["pos_embed"] = order.interleave(cls, patches)
    return out


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights inside what timm read from a file, in the layout of `model`."""
    for name in ("model", "state_dict"):
        if isinstance(state_dict.get(name), dict):
            state_dict = clean_state_dict(state_dict[name])
            break
    return _adapted(state_dict, model)


def _adapted(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return `state_dict` in the layout of `model`, its position embedding on the model's grid."""
    broken = [
        key
        for key, value in state_dict.items()
        if value.is_floating_point() and not value.is_meta and not value.isfinite().all()
    ]
    if broken:
        raise ValueError(
            f"the checkpoint has NaN or infinite weights in {', '.join(broken[:8])}"
            + (f" and {len(broken) - 8} others" if len(broken) > 8 else "")
            + ": use another one, or see where its training diverged"
        )
    out = dict(state_dict)
    if is_official(state_dict):
        embedded = model.num_embedded_cls_tokens > 0
        out = to_native(state_dict, model.cls_token_position if embedded else "none")
    pos_embed = out.get("pos_embed")
    if pos_embed is not None and model.pos_embed is not None:
        prefix = model.num_embedded_cls_tokens
        side = math.isqrt(max(pos_embed.shape[1] - prefix, 0))
        square = side > 0 and side * side == pos_embed.shape[1] - prefix
        same = pos_embed.shape == model.pos_embed.shape
        if square and not same and pos_embed.shape[-1] == model.pos_embed.shape[-1]:
            out["pos_embed"] = resample_abs_pos_embed(
                pos_embed,
                list(model.patch_embed.grid_size),
                [side, side],
                num_prefix_tokens=prefix,
            )
    return out


def load_state_dict_pre_hook(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Adapt what any `load_state_dict` brings, official files included, before it is loaded.

    Installed by `VisionMamba`, so that every way of loading weights works: timm's, torch's, that
    of a detector which holds the model.
    """
    own = {k.removeprefix(prefix): k for k in state_dict if k.startswith(prefix)}
    adapted = _adapted({k: state_dict[full] for k, full in own.items()}, model)
    for full in own.values():
        del state_dict[full]
    state_dict.update({prefix + k: v for k, v in adapted.items()})
    expected = model.state_dict()
    for key, value in adapted.items():
        if key in expected and expected[key].shape != value.shape:
            error_msgs.append(_mismatch(prefix + key, value, expected[key]))


def _mismatch(key: str, given: Tensor, expected: Tensor) -> str:
    """Return what is wrong with a weight's shape, and what to do."""
    remedy = "build the model with the sizes that the checkpoint was made with"
    if key.endswith(("head.weight", "head.bias")):
        remedy = (
            f"build the model with num_classes={given.shape[0]} and call reset_classifier, or use "
            "create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file=...)), which "
            "leaves the classifier out"
        )
    elif key.endswith("pos_embed") and given.shape[-1] == expected.shape[-1]:
        remedy = (
            "only a square grid can be resampled without knowing its shape: build the model with "
            "the image size of the checkpoint and call set_input_size"
        )
    elif key.endswith("patch_embed.proj.weight") and given.shape[1] != expected.shape[1]:
        remedy = (
            f"build the model with in_chans={given.shape[1]}, or use create_model(..., "
            "pretrained=True, pretrained_cfg_overlay=dict(file=...)), which adapts the channels"
        )
    shapes = f"the checkpoint has {tuple(given.shape)}, the model {tuple(expected.shape)}"
    return f"{key}: {shapes}: {remedy}."
