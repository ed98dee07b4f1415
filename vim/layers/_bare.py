"""Whether somebody looks at a module's calls."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["is_bare"]


def is_bare(*modules: nn.Module) -> bool:
    """Whether calling each is calling its class's `forward`, and nothing else.

    Only then may somebody else do its work.
    """
    if _has_any_global_hook():
        return False
    for module in modules:
        own = vars(module)
        hooked = (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        )
        if hooked or "forward" in own or own.get("_compiled_call_impl") is not None:
            return False
    return True
