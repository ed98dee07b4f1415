"""Where class and register tokens stand among the patches while they are scanned."""

import torch
from torch import Tensor, nn

__all__ = ["TokenOrder"]

CLS_POSITIONS = {"none": [], "first": [(0, 1)], "middle": [(1, 2)], "last": [(1, 1)]}
CLS_POSITIONS["both_ends"] = CLS_POSITIONS["first"] + CLS_POSITIONS["last"]


class TokenOrder(nn.Module):
    """Put prefix tokens among the patches, and take them out again.

    A scan passes on what it has read, so it matters where a token stands that is to summarise the
    image: Vim's class token stands in the middle (Zhu et al. 2024, arXiv:2401.09417), the
    registers of Mamba-R spread evenly (Wang et al. 2024, arXiv:2405.14858).

    With M patches, a token at fraction p / q stands before patch M * p // q. Outside the scan the
    order is timm's: class tokens, registers, patches.

    Args:
        cls_token_position: "none", "first", "middle", "last" or "both_ends" (two class tokens).
        reg_tokens: number of registers.
        reg_token_position: "even" or "middle" (behind a class token that stands there, too).
    """

    sequence: list[tuple[int, int, int]]

    def __init__(
        self,
        cls_token_position: str = "middle",
        reg_tokens: int = 0,
        reg_token_position: str = "even",
    ) -> None:
        super().__init__()
        if cls_token_position not in CLS_POSITIONS:
            raise ValueError(
                f"cls_token_position must be one of {', '.join(CLS_POSITIONS)}, "
                f"got {cls_token_position!r}"
            )
        if reg_token_position not in ("even", "middle"):
            raise ValueError(
                f"reg_token_position must be 'even' or 'middle', got {reg_token_position!r}"
            )
        if reg_tokens < 0:
            raise ValueError(f"reg_tokens must not be negative, got {reg_tokens}")
        fractions = list(CLS_POSITIONS[cls_token_position])
        self.num_cls_tokens = len(fractions)
        self.num_prefix_tokens = len(fractions) + reg_tokens
        for i in range(reg_tokens):
            fractions.append((i + 1, reg_tokens + 1) if reg_token_position == "even" else (1, 2))
        order = sorted(range(len(fractions)), key=lambda i: fractions[i][0] / fractions[i][1])
        # In the order of the scan: which prefix token comes, and before which fraction of patches.
        self.sequence = [(i, fractions[i][0], fractions[i][1]) for i in order]

    def interleave(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """(B, P, D) prefix and (B, M, D) patches -> (B, P + M, D) in the order of the scan."""
        count = patches.shape[1]
        parts: list[Tensor] = []
        done = 0
        for i, p, q in self.sequence:
            stop = count * p // q
            parts.append(patches[:, done:stop])
            parts.append(prefix[:, i : i + 1])
            done = stop
        parts.append(patches[:, done:])
        return torch.cat(parts, dim=1)

    def separate(self, x: Tensor) -> Tensor:
        """(B, P + M, D) in the order of the scan -> (B, P + M, D), prefix tokens first."""
        count = x.shape[1] - self.num_prefix_tokens
        prefix = [x[:, :0]] * self.num_prefix_tokens
        patches: list[Tensor] = []
        done = 0
        for rank, (i, p, q) in enumerate(self.sequence):
            position = count * p // q + rank
            patches.append(x[:, done:position])
            prefix[i] = x[:, position : position + 1]
            done = position + 1
        patches.append(x[:, done:])
        return torch.cat(prefix + patches, dim=1)
