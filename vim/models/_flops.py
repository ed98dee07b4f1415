"""Floating-point operations of a model."""

import copy
import functools

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["flops"]


def flops(
    model: nn.Module,
    img_size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
) -> int:
    """Return the floating-point operations of a forward pass, by shapes alone: nothing is computed.

    Products, convolutions, attention and selective scans count; activations, norms and softmax do
    not. A multiplication and an addition are two operations, so that papers which count
    multiply-accumulates, as timm does, state half as many. A scan costs 9 B L D N a direction.
    `torch.utils.flop_counter.FlopCounterMode` counts the same, by module on request.

    Args:
        model: any model of images, of timm or not.
        img_size: side, or (height, width), in pixels; by default what the model's
            `pretrained_cfg` or patch embedding says.
        batch_size: images.

    Raises:
        ValueError: no `img_size`, and a model that does not tell.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    channels = getattr(model, "in_chans", None) or (config.get("input_size") or (3,))[0]
    if img_size is None:
        img_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        img_size = img_size or (config.get("input_size") or (None,) * 3)[1:]
        if img_size[0] is None:
            raise ValueError(
                f"{type(model).__name__} does not tell the size of its images: give img_size"
            )
    shadow = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    for module in shadow.modules():
        if isinstance(module, nn.RNNBase):
            module.forward = functools.partial(_all_steps_at_once, module)
    image = torch.empty(batch_size, channels, *to_2tuple(img_size), device="meta")
    dtype = next((p.dtype for p in shadow.parameters() if p.is_floating_point()), image.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(image.to(dtype))
    return counter.get_total_flops()


def _all_steps_at_once(
    network: nn.RNNBase, tokens: Tensor | PackedSequence, hx: object = None
) -> tuple:
    """Do the products of a recurrent network for all tokens together, on the meta device.

    PyTorch goes through them one by one: half a minute for 197 tokens and 24 layers.
    """
    if isinstance(tokens, PackedSequence):
        return type(network).forward(network, tokens, hx)
    directions = 1 + network.bidirectional
    features = network.proj_size or network.hidden_size
    for weight in network.parameters():
        if weight.ndim == 2:
            tokens.new_empty(tokens.shape[:-1].numel(), weight.shape[1]) @ weight.T
    batch = [] if tokens.ndim == 2 else [tokens.shape[0 if network.batch_first else 1]]
    last = [
        tokens.new_empty(directions * network.num_layers, *batch, size)
        for size in (features, network.hidden_size)
    ]
    result = tokens.new_empty(*tokens.shape[:-1], directions * features)
    return result, tuple(last) if isinstance(network, nn.LSTM) else last[0]
