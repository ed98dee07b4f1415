"""Modules that the models are made of."""

from .add_norm import Add, AddNorm
from .attention import Attention
from .block import FeedForward, VimBlock
from .causal_conv1d import CausalConv1d
from .causal_mamba import Mamba
from .causal_mamba2 import Mamba2
from .components import FFNS, MIXERS, Component, build_ffns, build_mixers
from .gated_conv import GatedConv
from .mamba import BidirectionalMamba, MambaBranch
from .mamba2 import BidirectionalMamba2
from .mamba3 import BidirectionalMamba3
from .moe import MixtureOfExperts, load_balance_loss
from .patch_embed import EMBED_LAYERS, ConvStem, PatchEmbed
from .projectors import PROJECTORS, LDPProjector, MLPProjector, build_projector
from .recurrent import GRU, LSTM, RNN
from .s4d import S4D, S4DConvolution
from .token_order import TokenOrder

__all__ = [
    "EMBED_LAYERS",
    "FFNS",
    "GRU",
    "LSTM",
    "MIXERS",
    "PROJECTORS",
    "RNN",
    "S4D",
    "Add",
    "AddNorm",
    "Attention",
    "BidirectionalMamba",
    "BidirectionalMamba2",
    "BidirectionalMamba3",
    "CausalConv1d",
    "Component",
    "ConvStem",
    "FeedForward",
    "GatedConv",
    "LDPProjector",
    "MLPProjector",
    "Mamba",
    "Mamba2",
    "MambaBranch",
    "MixtureOfExperts",
    "PatchEmbed",
    "S4DConvolution",
    "TokenOrder",
    "VimBlock",
    "build_ffns",
    "build_mixers",
    "build_projector",
    "load_balance_loss",
]
