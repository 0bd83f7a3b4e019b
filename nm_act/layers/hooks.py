"""Keeps the hooks that users registered on a layer when another layer replaces it."""

from torch import nn

_CARRIED = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def take_over_hooks(layer: nn.Module, old: nn.Module) -> None:
    """Let ``layer`` call the forward and backward hooks of ``old``, which it replaces."""
    # The same dictionaries, not copies: users' handles remove hooks from these.
    vars(layer).update({name: vars(old)[name] for name in _CARRIED})


def refuse_uncarried(name: str, layer: nn.Linear) -> None:
    """Raise a ValueError for a layer whose replacement would lose hooks on its state or a replaced forward."""
    what = ""
    if any(getattr(layer, hooks) for hooks in _STATE_HOOKS):
        what = "hooks of state_dict or load_state_dict"
    # accelerate sets forward on the instance too, with _hf_hook, to place the weight.
    elif "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):
        what = "a forward set on the instance"
    if what:
        raise ValueError(
            f"expected linear layers whose hooks a sparse layer can take over, got {what} on {name}; remove it first, "
            "or leave the layer dense by the recipe"
        )
