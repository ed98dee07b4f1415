"""Modules that the models are made of."""

from .add_norm import Add, AddNorm
from .block import VimBlock
from .causal_conv1d import CausalConv1d
from .mamba import BidirectionalMamba, MambaBranch
from .patch_embed import PatchEmbed
from .token_order import TokenOrder

__all__ = [
    "Add",
    "AddNorm",
    "BidirectionalMamba",
    "CausalConv1d",
    "MambaBranch",
    "PatchEmbed",
    "TokenOrder",
    "VimBlock",
]
