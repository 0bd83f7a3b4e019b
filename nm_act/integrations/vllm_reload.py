"""Keeps an engine serving after a failed reload."""

import functools
import operator
import sys
from typing import Any

from vllm.model_executor.model_loader.reload import layerwise

_USED = (
    *("LAYERWISE_INFO", "LOADING_LAYERS", "_place_kernel_tensors"),
    *("LayerReloadingInfo.can_load", "LayerReloadingInfo.reset"),
)
"""The names in vLLM's private code that this module needs."""


def check_interface() -> None:
    """Raise an AttributeError if vLLM's private code has changed."""
    operator.attrgetter(*_USED)(layerwise)


def guard_reloads() -> None:
    """Keep an engine serving after a failed reload.

    vLLM would leave its layers without memory. This guard gives each layer its old tensors back; layers that were
    complete keep their new weights.
    """
    module = sys.modules.get("vllm.v1.worker.gpu_worker")  # of the process that has a worker
    worker = getattr(module, "Worker", None)
    reload = getattr(worker, "reload_weights", None)
    if worker is None or reload is None or hasattr(reload, "nm_act"):
        return

    @functools.wraps(reload)
    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        config = self.vllm_config.model_config
        source = config.model, config.revision
        try:
            reload(self, *args, **kwargs)
        except Exception as error:  # any error: the engine must go on
            config.model, config.revision = source
            new = undo_reload()
            if new is None:
                raise
            raise RuntimeError(
                f"expected the weights of the model that is served, got others ({_reason(error)}); {new} layers have "
                "new weights and all others their old ones, so reload a whole checkpoint of this model"
            ) from error

    reload_weights.nm_act = True  # type: ignore[attr-defined]
    worker.reload_weights = reload_weights


def _reason(error: Exception) -> str:
    """The first sentence of an error; vLLM's next ones may list all of a model's parameters."""
    text = " ".join(str(error).split()).partition(". ")[0]
    return text or ("of other sizes" if isinstance(error, AssertionError) else type(error).__name__)


def undo_reload() -> int | None:
    """Give the layers of an unfinished reload their tensors back; how many were finished, None if it had not begun."""
    layers = list(layerwise.LAYERWISE_INFO.items())
    unfinished = [(layer, info) for layer, info in layers if info.can_load()]
    for layer, info in unfinished:
        if hasattr(layer, "nm_act_loading"):
            layer.nm_act_loading = None
        layerwise._place_kernel_tensors(layer, info)
        info.reset()
    layerwise.LOADING_LAYERS.clear()
    if not unfinished:
        return None
    return sum(bool(layer._parameters) for layer, _ in layers) - sum(bool(each._parameters) for each, _ in unfinished)
