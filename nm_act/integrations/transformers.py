"""Transformers: load, save and reload sparse models through ``quantization_config``.

Importing this module registers the method "nm_act" with Transformers; ``import nm_act`` arranges for that
by itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..conversion.sparsify import RECORDERS, replace_linears
from ..layers.linear import FOLLOW_WEIGHT, sparse_layers
from ..recipe import Recipe
from ..supported import require, warn_if_untested
from .tensor_parallel import check_plan
from .vllm_plan import STORAGE_KEYS

require("transformers", "transformers")
from transformers.quantizers.auto import register_quantization_config, register_quantizer  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

QUANT_METHOD = "nm_act"

warn_if_untested("transformers")


@register_quantization_config(QUANT_METHOD)
class NMActConfig(QuantizationConfigMixin):
    """A recipe as a Transformers ``quantization_config``.

    Parameters
    ----------
    recipe : Recipe, dict, path or str, optional
        A recipe, its plain mapping, the path of a .yaml or .json file, or the name of a recommended one
        (``Recipe.named``).
    **fields
        The fields of a :class:`~nm_act.Recipe`, instead of ``recipe``.

    Raises
    ------
    ValueError
        If both or neither are given, or the recipe is not valid.

    Examples
    --------
    >>> NMActConfig(pattern="8:16", skip_layers=[0]).recipe.pattern
    '8:16'
    """

    def __init__(self, recipe: Recipe | dict[str, Any] | str | None = None, **fields: Any):
        for name in ("quant_method", *STORAGE_KEYS):  # a saved config has the first; the others are for vLLM
            fields.pop(name, None)
        if isinstance(recipe, dict):  # first, because the version says whether a newer nm_act wrote it
            recipe = Recipe.from_dict(recipe)
        if recipe is not None and fields:
            raise ValueError(
                f"expected a recipe or its fields, got both (fields {', '.join(fields)}); pass one of them"
            )
        if recipe is None:
            recipe = Recipe.from_dict(fields)
        elif not isinstance(recipe, Recipe):
            recipe = Recipe.load(recipe)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.recipe = recipe

    def to_dict(self) -> dict[str, Any]:
        """The plain mapping that is written to ``config.json``."""
        return {"quant_method": self.quant_method, "recipe": self.recipe.to_dict()}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


@register_quantizer(QUANT_METHOD)
class NMActQuantizer(HfQuantizer):
    """Inserts :class:`~nm_act.NMLinear` layers into a model during loading; the weights are stock ones."""

    quantization_config: NMActConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        report = replace_linears(model, self.quantization_config.recipe)
        check_plan(model)
        vectors = {
            f"{name}.{key}"
            for name, _ in report.replaced
            for key in model.get_submodule(name).data()
            if key not in FOLLOW_WEIGHT
        }
        model._keep_in_fp32_modules_strict = vectors | set(model._keep_in_fp32_modules_strict or ())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _check_weights(model)
        for layer in sparse_layers(model).values():
            # Transformers allocates what the checkpoint lacks but does not initialise it.
            for value in layer.data().values():
                if not getattr(value, "_is_hf_initialized", False):
                    value.fill_(torch.nan)
            layer.refresh()
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether ``Trainer`` may fine-tune the model, at least through adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether ``Trainer`` may train the weights themselves, which are the dense ones."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model; methods that read whole sequences break the graph."""
        return not self.quantization_config.recipe.needs_token_context


def _check_weights(model: nn.Module) -> None:
    """Refuse a sparse layer whose weight the checkpoint lacks: Transformers would leave random values."""
    for name, layer in sparse_layers(model).items():
        own = layer.named_parameters(recurse=False)
        # Transformers marks what it has read or tied. What stays on disk (on the meta device) cannot be checked.
        # Calibrated data are buffers, which the layer itself checks.
        lacking = next(
            (key for key, value in own if not (value.is_meta or getattr(value, "_is_hf_initialized", False))), None
        )
        if lacking is not None:
            raise ValueError(
                f"expected every sparse layer's weight in the checkpoint of this {type(model).__name__}, but it lacks "
                f"{name}.{lacking} in that shape; download or save the model again"
            )


def quantisation_of(config: Any) -> str | None:
    """Name of the quantisation method in a Transformers configuration."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return getattr(method, "value", method)  # Transformers' own methods are an Enum


def forget_gguf(model: Any) -> None:
    """Make a dequantised model an ordinary one, because Transformers refuses to save a model marked as GGUF."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)


def record_recipe(model: Any, recipe: Recipe) -> str:
    """Write the recipe into a Transformers model's config for saving; returns a note if that is impossible."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):  # PEFT: for the merged model
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        return ""
    method = quantisation_of(model.config)
    if method == "gguf" and not getattr(model.hf_quantizer, "packed_modules", None):
        forget_gguf(model)
    elif method is not None:
        return (
            f"note: the model's config already holds the quantisation method {method!r}, so save_pretrained "
            "will not record the recipe; save the recipe with Recipe.save and apply it again after loading"
        )
    model.config.quantization_config = NMActConfig(recipe)
    return ""


RECORDERS.append(record_recipe)
