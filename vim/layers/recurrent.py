"""Recurrent networks as mixers: LSTM, GRU and the plain RNN, in both directions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["GRU", "LSTM", "RNN"]


class _Recurrent(nn.Module):
    """Mix tokens by a recurrent network in both directions: (B, L, dim) -> (B, L, dim).

    The states of the two directions, side by side, are projected back to `dim`. PyTorch computes
    the network, cuDNN on a GPU, in the dtype of its weights. `torch.compile` leaves it outside its
    graphs; with `torch._dynamo.config.allow_rnn = True` it takes it in, one step after another.

    Args:
        dim: features of the tokens.
        hidden_size: features of the state of one direction; None is dim / 2.
        bias: whether the output projection has one (the network always has).
    """

    cell: Callable[..., nn.RNNBase]

    def __init__(
        self, dim: int, hidden_size: int | None = None, bias: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden_size = dim // 2 if hidden_size is None else hidden_size
        self.rnn = self.cell(dim, hidden_size, batch_first=True, bidirectional=True, **dd)
        self.out_proj = nn.Linear(2 * hidden_size, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.rnn.weight_ih_l0.dtype)
        if torch.jit.is_scripting():
            return self.out_proj(self.rnn(x)[0])
        # Autocast of any dtype has cuDNN compute in float16, where gradients vanish.
        with torch.autocast("cuda", enabled=False):
            y = self.rnn(x)[0]
        return self.out_proj(y)


class LSTM(_Recurrent):
    __doc__ = f"""{_Recurrent.__doc__}
    Source: Hochreiter & Schmidhuber 1997; with a forget gate, Gers et al. 2000::

        i, f, o = sigmoid(W x_t + U h_{{t-1}} + b)      g = tanh(W x_t + U h_{{t-1}} + b)
        c_t = f * c_{{t-1}} + i * g                     h_t = o * tanh(c_t)
    """
    cell = nn.LSTM


class GRU(_Recurrent):
    __doc__ = f"""{_Recurrent.__doc__}
    Source: Cho et al. 2014, arXiv:1406.1078, with the reset gate behind U, as cuDNN has it::

        r, z = sigmoid(W x_t + U h_{{t-1}} + b)         n = tanh(W x_t + b + r * (U h_{{t-1}} + b'))
        h_t = (1 - z) * n + z * h_{{t-1}}
    """
    cell = nn.GRU


class RNN(_Recurrent):
    __doc__ = f"""{_Recurrent.__doc__}
    Source: Elman 1990::

        h_t = tanh(W x_t + U h_{{t-1}} + b)
    """
    cell = nn.RNN
