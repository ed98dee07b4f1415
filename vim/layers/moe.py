"""A feed-forward of many experts, of which each token takes one or a few.

Size letters: B batch, L tokens, D features, E experts, k choices of a token, S places of an expert.
"""

import math

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vim.ops._autograd import composite

from ._autocast import no_autocast

__all__ = ["ExpertLinear", "MixtureOfExperts", "load_balance_loss"]


class ExpertLinear(nn.Module):
    """A linear layer for each expert: (E, T, in_features) -> (E, T, out_features).

    Args:
        num_experts: E.
        in_features, out_features: as in `nn.Linear`.
    """

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **dd))
        self.bias = nn.Parameter(torch.empty(num_experts, 1, out_features, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[2])  # as nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.to(x.dtype), x, self.weight.mT.to(x.dtype))


@register_notrace_module
class MixtureOfExperts(nn.Module):
    """Send each token through its best experts: (B, L, D) -> (B, L, D).

    With p = softmax(router(x)) and the k experts of largest p, each an MLP::

        y = sum_e g_e expert_e(x)      g_e = p_e for k = 1, else p_e / (sum of the chosen p)

    Source: Fedus et al. 2022, "Switch Transformers", arXiv:2101.03961, eq. 1 to 6 (k = 1, capacity,
    loss); Lepikhin et al. 2020, "GShard", arXiv:2006.16668, algorithm 1 (k > 1, groups). In MoE-
    Mamba (Pioro et al. 2024, arXiv:2401.04081) such a layer follows every Mamba layer.

    An expert has S = ceil(capacity_factor k L / E) places for an image. First choices are placed
    before second ones, and earlier tokens before later ones; a choice that finds no place is
    dropped, and what it would have added is zero, so that the token goes on by the residual stream.
    Places are counted image by image, so that what becomes of an image does not depend on its
    batch, nor on how many processes share that.

    After a forward pass the module has, of this pass and process:

    - `aux_loss`: E sum_e f_e P_e, with f_e the share of the first choices that fall on e and P_e
      the mean of p_e, the mean over images; 1 where the load is even. Times a factor (Switch: 0.01)
      it belongs in the training's loss; see `load_balance_loss`.
    - `load`: (E,) choices that each expert has taken.
    - `dropped`: () choices that were dropped; it and the load sum to B L k.

    Routing is in float32 (float64 where the input is), as in Switch, section 2.4.

    Args:
        dim: D.
        num_experts: E.
        ratio: of an expert's hidden features to `dim`; 3 is MoE-Mamba's.
        top_k: k.
        capacity_factor: of the places in training.
        eval_capacity_factor: of the places in evaluation.
    """

    aux_loss: Tensor
    load: Tensor
    dropped: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int = 8,
        ratio: float = 3.0,
        top_k: int = 1,
        capacity_factor: float = 1.25,
        eval_capacity_factor: float = 2.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be from 1 to num_experts = {num_experts}, got {top_k}")
        for name, factor in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
        ):
            if factor <= 0:
                raise ValueError(f"{name} must be positive, got {factor}")
        dd = {"device": device, "dtype": dtype}
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.router = nn.Linear(dim, num_experts, bias=False, **dd)
        self.fc1 = ExpertLinear(num_experts, dim, int(ratio * dim), **dd)
        self.act = nn.GELU()
        self.fc2 = ExpertLinear(num_experts, int(ratio * dim), dim, **dd)
        self._forget()

    def _forget(self) -> None:
        # Not buffers: DDP would overwrite every process's with the first one's.
        self.aux_loss = torch.zeros(())
        self.load = torch.zeros(self.num_experts, dtype=torch.long)
        self.dropped = torch.zeros((), dtype=torch.long)

    def __getstate__(self) -> dict:
        """Leave out what the last pass has left, whose graph cannot be copied."""
        state = self.__dict__.copy()
        for name in ("aux_loss", "load", "dropped"):
            state.pop(name)
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()

    def forward(self, x: Tensor) -> Tensor:
        probabilities = torch.ops.vim.router_probabilities(x, self.router.weight)  # (B, L, E)
        if self.top_k == 1:
            gates, experts = probabilities.max(-1, keepdim=True)  # a simpler kernel
        else:
            gates, experts = probabilities.topk(self.top_k, dim=-1)  # (B, L, k)
            gates = gates / gates.sum(-1, keepdim=True)

        places = self.places(x.shape[1])
        place, counts = _places_in_line(experts, self.num_experts)
        kept = place < places
        taken = counts.clamp(max=places)
        first = nn.functional.one_hot(experts[..., 0], self.num_experts).to(probabilities.dtype)
        balance = (first.mean(1) * probabilities.mean(1)).sum(-1)
        self.aux_loss = self.num_experts * balance.mean()
        self.load = taken.sum(0)
        self.dropped = kept.numel() - self.load.sum()

        # Rows of the experts' input, (E, B, S) in order; dropped choices share a row behind it.
        batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
        row = (experts * x.shape[0] + batch) * places + place
        rows = self.num_experts * x.shape[0] * places
        row = torch.where(kept, row, rows).flatten()
        copies = x.unsqueeze(2).expand(-1, -1, self.top_k, -1).flatten(0, 2)
        inputs = x.new_zeros(rows + 1, x.shape[-1]).index_copy(0, row, copies)
        outputs = self.fc2(self.act(self.fc1(inputs[:-1].unflatten(0, [self.num_experts, -1]))))
        outputs = outputs.flatten(0, 1)
        # A dropped choice reads some row, and its gate is zero.
        chosen = outputs.index_select(0, row.clamp(max=rows - 1)).unflatten(0, experts.shape)
        gates = (gates * kept).to(outputs.dtype)
        weighted = gates.unsqueeze(-1) * chosen
        weighted = weighted.squeeze(2) if self.top_k == 1 else weighted.sum(2)
        return weighted.to(x.dtype)

    def places(self, length: int) -> int:
        """Return S for images of `length` tokens."""
        # An expert is chosen by each token once at most.
        return min(length, math.ceil(self._factor() * self.top_k * length / self.num_experts))

    def _factor(self) -> float:
        return self.capacity_factor if self.training else self.eval_capacity_factor

    @torch.jit.ignore
    def has_place_for_all(self) -> bool:
        """Whether no choice is ever dropped, so that a token's result depends on it alone."""
        return self._factor() * self.top_k >= self.num_experts

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, "
            f"capacity_factor={self.capacity_factor}"
        )


@composite("router_probabilities")
def _probabilities(x: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device.type):
        return nn.functional.linear(x.to(dtype), weight.to(dtype)).softmax(-1)


def _places_in_line(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return how many of its image stand before each choice, and how many chose each expert.

    In line stand first choices before second ones, then tokens in their order.

    Args:
        experts: (B, L, k) what was chosen.
        num_experts: E.

    Returns:
        (B, L, k) and (B, E), integers.
    """
    _, length, top_k = experts.shape
    line = experts.mT.flatten(1).unsqueeze(1)  # (B, 1, k L)
    names = torch.arange(num_experts, device=line.device).unsqueeze(1)
    so_far = (line == names).cumsum(2, dtype=torch.int32)  # (B, E, k L)
    place = so_far.gather(1, line).squeeze(1) - 1
    return place.unflatten(1, [top_k, length]).mT, so_far[:, :, -1]


def load_balance_loss(model: nn.Module) -> Tensor:
    """Return the sum of `aux_loss` over the experts' layers of `model`, of its last forward pass.

    Zero where there is none. Add it, times a factor, to the loss of a training step.
    """
    losses = [m.aux_loss for m in model.modules() if isinstance(m, MixtureOfExperts)]
    return torch.stack(losses).sum() if losses else torch.zeros(())
