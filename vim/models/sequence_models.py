"""The sequence models beside Vim, as presets of about the sizes of Vim-Ti and Vim-S.

All are `VisionMamba`s that differ from Vim in mixer and feed-forward alone, and in depth, which is
chosen for as many parameters; `docs/sequence_models.md` has the table. Nobody has published weights
for them.
"""

from timm.models import generate_default_cfgs, register_model

from vim.layers import Component

from .vision_mamba import VisionMamba, _cfg, _create

__all__: list[str] = []

_NAMES = (
    "attention",
    "gated_conv",
    "gru",
    "hybrid",
    "lstm",
    "mamba",
    "mamba2",
    "mamba3",
    "mamba_alternating",
    "moe_mamba",
    "rnn",
    "s4d",
)

default_cfgs = generate_default_cfgs(
    {
        f"{name}_{size}_patch16_224.untrained": _cfg()
        for name in _NAMES
        for size in ("tiny", "small")
    }
)


def _alternating(depth: int) -> list[Component]:
    """Return Mamba mixers of which every second one scans from the last token."""
    return [{"name": "mamba", "reverse": i % 2 == 1} for i in range(depth)]


def _attention_last(depth: int, count: int) -> dict[str, list[Component]]:
    """Return the mixers and feed-forwards of Vim with a Transformer's in the last blocks."""
    count = min(count, depth)
    return {
        "mixer": ["bimamba"] * (depth - count) + ["attention"] * count,
        "ffn": ["none"] * (depth - count) + ["mlp"] * count,
    }


@register_model
def attention_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """A Transformer, the blocks of DeiT; of Vim-Ti's size."""
    preset = {"embed_dim": 192, "depth": 15, "mixer": "attention", "ffn": "mlp"}
    return _create("attention_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def attention_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """A Transformer, the blocks of DeiT; of Vim-S's size."""
    preset = {"embed_dim": 384, "depth": 14, "mixer": "attention", "ffn": "mlp"}
    return _create("attention_small_patch16_224", pretrained, preset, kwargs)


@register_model
def gated_conv_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim without its scan, after MambaOut, and the mean of the patches; of Vim-Ti's size."""
    preset = {
        "embed_dim": 192,
        "depth": 30,
        "mixer": "gated_conv",
        "class_token": False,
        "global_pool": "avg",
    }
    return _create("gated_conv_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def gated_conv_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim without its scan, after MambaOut, and the mean of the patches; of Vim-S's size."""
    preset = {
        "embed_dim": 384,
        "depth": 28,
        "mixer": "gated_conv",
        "class_token": False,
        "global_pool": "avg",
    }
    return _create("gated_conv_small_patch16_224", pretrained, preset, kwargs)


@register_model
def gru_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """GRUs of both directions; of Vim-Ti's size."""
    preset = {"embed_dim": 192, "depth": 24, "mixer": {"name": "gru", "hidden_size": 120}}
    return _create("gru_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def gru_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """GRUs of both directions; of Vim-S's size."""
    preset = {"embed_dim": 384, "depth": 24, "mixer": {"name": "gru", "hidden_size": 232}}
    return _create("gru_small_patch16_224", pretrained, preset, kwargs)


@register_model
def hybrid_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim with a Transformer's blocks as the last four; of Vim-Ti's size."""
    depth = kwargs.setdefault("depth", 22)
    preset = {"embed_dim": 192, **_attention_last(depth, 4)}
    return _create("hybrid_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def hybrid_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim with a Transformer's blocks as the last four; of Vim-S's size."""
    depth = kwargs.setdefault("depth", 21)
    preset = {"embed_dim": 384, **_attention_last(depth, 4)}
    return _create("hybrid_small_patch16_224", pretrained, preset, kwargs)


@register_model
def lstm_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """LSTMs of both directions; of Vim-Ti's size."""
    preset = {"embed_dim": 192, "depth": 24, "mixer": {"name": "lstm", "hidden_size": 104}}
    return _create("lstm_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def lstm_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """LSTMs of both directions; of Vim-S's size."""
    preset = {"embed_dim": 384, "depth": 24, "mixer": {"name": "lstm", "hidden_size": 192}}
    return _create("lstm_small_patch16_224", pretrained, preset, kwargs)


@register_model
def mamba_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Mamba of one direction, the class token last; of Vim-Ti's size."""
    preset = {"embed_dim": 192, "depth": 27, "mixer": "mamba", "cls_token_position": "last"}
    return _create("mamba_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def mamba_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Mamba of one direction, the class token last; of Vim-S's size."""
    preset = {"embed_dim": 384, "depth": 26, "mixer": "mamba", "cls_token_position": "last"}
    return _create("mamba_small_patch16_224", pretrained, preset, kwargs)


@register_model
def mamba_alternating_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Mamba of one direction, every second block the other; of Vim-Ti's size."""
    depth = kwargs.setdefault("depth", 27)
    preset = {"embed_dim": 192, "mixer": _alternating(depth)}
    return _create("mamba_alternating_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def mamba_alternating_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Mamba of one direction, every second block the other; of Vim-S's size."""
    depth = kwargs.setdefault("depth", 26)
    preset = {"embed_dim": 384, "mixer": _alternating(depth)}
    return _create("mamba_alternating_small_patch16_224", pretrained, preset, kwargs)


@register_model
def mamba2_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Mamba-2 of both directions; of Vim-Ti's size."""
    preset = {"embed_dim": 192, "depth": 24, "mixer": "mamba2"}
    return _create("mamba2_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def mamba2_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Mamba-2 of both directions; of Vim-S's size."""
    preset = {"embed_dim": 384, "depth": 25, "mixer": "mamba2"}
    return _create("mamba2_small_patch16_224", pretrained, preset, kwargs)


@register_model
def mamba3_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Mamba-3 of both directions; of Vim-Ti's size."""
    preset = {"embed_dim": 192, "depth": 24, "mixer": "mamba3"}
    return _create("mamba3_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def mamba3_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Mamba-3 of both directions; of Vim-S's size."""
    preset = {"embed_dim": 384, "depth": 24, "mixer": "mamba3"}
    return _create("mamba3_small_patch16_224", pretrained, preset, kwargs)


@register_model
def moe_mamba_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim with eight experts behind every mixer, one a token; of Vim-Ti's size."""
    preset = {"embed_dim": 192, "depth": 13, "ffn": "moe"}
    return _create("moe_mamba_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def moe_mamba_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim with eight experts behind every mixer, one a token; of Vim-S's size."""
    preset = {"embed_dim": 384, "depth": 13, "ffn": "moe"}
    return _create("moe_mamba_small_patch16_224", pretrained, preset, kwargs)


@register_model
def rnn_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Plain RNNs of both directions; of Vim-Ti's size."""
    preset = {"embed_dim": 192, "depth": 24, "mixer": {"name": "rnn", "hidden_size": 232}}
    return _create("rnn_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def rnn_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Plain RNNs of both directions; of Vim-S's size."""
    preset = {"embed_dim": 384, "depth": 24, "mixer": {"name": "rnn", "hidden_size": 432}}
    return _create("rnn_small_patch16_224", pretrained, preset, kwargs)


@register_model
def s4d_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """S4D of both directions; of Vim-Ti's size."""
    preset = {"embed_dim": 192, "depth": 23, "mixer": "s4d"}
    return _create("s4d_tiny_patch16_224", pretrained, preset, kwargs)


@register_model
def s4d_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """S4D of both directions; of Vim-S's size."""
    preset = {"embed_dim": 384, "depth": 24, "mixer": "s4d"}
    return _create("s4d_small_patch16_224", pretrained, preset, kwargs)
