"""Whether somebody looks at a module's calls."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["is_bare"]


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's `forward`, and nothing else.

    Only then may somebody else do its work.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    hooks += (module._backward_hooks, module._backward_pre_hooks)
    replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    return not (any(hooks) or replaced or _has_any_global_hook())
