"""Linear layers that read the same input, computed as one layer; checkpoints keep the stock names."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.hooks import take_over_hooks
from ..layers.linear import NMLinear
from ..layers.stale import parameter_of
from . import readonly
from .changed import Changed
from .eligible import calibrated, why_stays


class MergedLinear(nn.Module):
    """Several linear layers over one input, merged into one layer ``linear`` with concatenated outputs.

    ``names`` are the stock names of the merged layers in their parent and ``sizes`` their numbers of output features,
    in the order of the outputs. The parent keeps a :class:`LinearPart` under each stock name. In the parent's forward
    (:class:`SharesProducts`) the first part that is called computes all outputs, and every part returns its own.
    ``state_dict`` has the stock names and layout, each weight as a contiguous copy; ``load_state_dict`` accepts them.
    """

    linear: Any  # an nn.Linear, NMLinear or FP8Linear

    def __init__(self, linear: nn.Module, names: Sequence[str], sizes: Sequence[int]):
        super().__init__()
        self.linear = linear
        self.names, self.sizes = tuple(names), tuple(sizes)
        self.register_state_dict_post_hook(_split_state)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., sum(sizes)]``, all outputs."""
        y: Tensor = self.linear(x)
        return y

    def split(self, y: Tensor) -> list[Tensor | None]:
        """The outputs ``[..., size]`` of the merged layers, views of ``y [..., sum(sizes)]``."""
        return list(y.split(self.sizes, dim=-1))

    def extra_repr(self) -> str:
        """The merged layers, for printing."""
        return " + ".join(f"{name} ({size})" for name, size in zip(self.names, self.sizes, strict=True))


class Product:
    """The outputs of a merged layer for one input, within one call of its parent; each part takes its own.

    ``y [..., sum(sizes)]`` comes from a packed operand; the parts return it when called with ``placeholder``.
    """

    def __init__(self, merged: MergedLinear, placeholder: Tensor | None = None, y: Tensor | None = None):
        self.merged = merged
        self.filled = y is not None
        self._input = placeholder
        self._outputs: list[Tensor | None] = [] if y is None else merged.split(y)

    def take(self, x: Tensor, index: int) -> Tensor:
        """Output ``[..., sizes[index]]`` of one of the merged layers, a view of the merged one."""
        if self._input is not x:
            self._refuse_filled(index, "another one")
            self._input, self._outputs = x, self.merged.split(self.merged(x))
        output = self._outputs[index]
        self._outputs[index] = None  # frees what is no longer needed
        if output is None:
            self._refuse_filled(index, "it twice")
            return self.merged(x).split(self.merged.sizes, dim=-1)[index]  # type: ignore[no-any-return]
        return output

    def _refuse_filled(self, index: int, got: str) -> None:
        if self.filled:
            raise RuntimeError(
                f"expected {self.merged.names[index]} to be called once with the tensor that its layer was given, got "
                f"{got}; call deoptimize(model) for a model whose attention was changed"
            )


class LinearPart(nn.Module):
    """Replaces a merged layer under its stock name: the same call and attributes, but no parameters of its own."""

    _merged: MergedLinear

    def __init__(self, merged: MergedLinear, index: int):
        super().__init__()
        # Not a submodule here: it is registered in the parent.
        object.__setattr__(self, "_merged", merged)
        self._index = index
        self.in_features = merged.linear.in_features
        self.out_features = merged.sizes[index]

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, a view of the merged weight; refuses writes that would not reach it."""
        part = self._merged.linear.weight.split(self._merged.sizes)[self._index]
        return part if isinstance(part, readonly.Computed) else part.as_subclass(readonly.Part)

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, a view of the merged bias; refuses writes that would not reach it."""
        bias = self._merged.linear.bias
        return bias if bias is None else bias.split(self._merged.sizes)[self._index].as_subclass(readonly.Part)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            readonly.refuse_set(name)
        super().__setattr__(name, value)

    def forward(self, x: Tensor, product: Product | None = None) -> Tensor:
        """``x [..., in] -> [..., out]``, from the current call's product if there is one."""
        return (Product(self._merged) if product is None else product).take(x, self._index)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.in_features}, {self.out_features}, of {self._merged.extra_repr()}"


def merge(parent: nn.Module, names: list[str]) -> MergedLinear:
    """Replace linear layers of ``parent`` that have equal :func:`merge_key` by one; the old layers are left empty."""
    layers = [getattr(parent, name) for name in names]
    sizes = [layer.out_features for layer in layers]
    first = layers[0]
    linear = _layer_like(first, sum(sizes))
    grad = first.weight.requires_grad
    with torch.no_grad():
        if isinstance(first, NMLinear) and first.weight_layout == "in_out":
            weight = torch.cat([layer.weight.t() for layer in layers], dim=1).t()
        else:
            weight = torch.cat([layer.weight for layer in layers])
        linear.weight = nn.Parameter(weight, grad)
        if first.bias is not None:
            linear.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), first.bias.requires_grad)
    if isinstance(linear, NMLinear):
        linear.refresh()
    merged = MergedLinear(linear.train(first.training), names, sizes)
    setattr(parent, _child_name(names), merged)
    for index, name in enumerate(names):
        setattr(parent, name, LinearPart(merged, index))
    return merged


def unmerge(parent: nn.Module, child: str) -> None:
    """The inverse of :func:`merge`: separate layers under the stock names."""
    merged = getattr(parent, child)
    delattr(parent, child)
    linear = merged.linear
    weights, biases = linear.weight.split(merged.sizes), [None] * len(merged.sizes)
    if linear.bias is not None:
        biases = linear.bias.split(merged.sizes)
    for name, size, weight, bias in zip(merged.names, merged.sizes, weights, biases, strict=True):
        layer, weight = _layer_like(linear, size), weight.detach()
        is_in_out = isinstance(linear, NMLinear) and linear.weight_layout == "in_out"
        own = weight.t().clone().t() if is_in_out else weight.clone()
        layer.weight = nn.Parameter(own, linear.weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), linear.bias.requires_grad)
        if isinstance(layer, NMLinear):
            layer.refresh()
        take_over_hooks(layer, getattr(parent, name))
        setattr(parent, name, layer.train(linear.training))


def _layer_like(layer: nn.Linear, out_features: int) -> nn.Linear:
    """A copy of a dense or sparse layer on the meta device, with another number of outputs."""
    sizes: tuple[Any, ...] = (layer.in_features, out_features, layer.bias is not None)
    options: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
    if not isinstance(layer, NMLinear):
        return nn.Linear(*sizes, **options)
    options |= {"spec": layer.spec, "weight_layout": layer.weight_layout, "lift": layer.lift}
    sparse = NMLinear(*sizes, **options)
    sparse.token_context = layer.token_context
    return sparse


def merge_key(layer: nn.Module) -> tuple[Any, ...] | str:
    """Layers with equal keys can be merged; a string is the reason why a layer cannot."""
    if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, NMLinear):
        return f"{type(layer).__name__} is neither torch.nn.Linear nor NMLinear"
    why = why_stays(layer)
    if why:
        return why
    weight, bias = parameter_of(layer, "weight"), parameter_of(layer, "bias")
    assert weight is not None
    facts: tuple[Any, ...] = (layer.in_features, bias is not None, weight.dtype, weight.device)
    if isinstance(layer, NMLinear):
        if layer.channel_scale is not None:
            return f"the scores of {layer.spec.criterion!r} differ from layer to layer"
        if calibrated(layer):
            return f"it has calibrated data of its own ({', '.join(sorted(calibrated(layer)))})"
        facts += (layer.spec, layer.weight_layout, layer.lift, id(layer.token_context))
    return facts


class SharesProducts(Changed):
    """A parent of merged layers: during its forward, each merged layer computes one product for all its parts."""

    def forward(self, *args: Any, nm_act_product: Product | None = None, **kwargs: Any) -> Any:
        """The stock forward; ``nm_act_product``, if given, is the product, already computed."""
        products = {child.names: Product(child) for child in self.children() if isinstance(child, MergedLinear)}
        if nm_act_product is not None:
            products[nm_act_product.merged.names] = nm_act_product
        return self.nm_act_stock.forward(_Running(self, products), *args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        _join_state(self, state_dict, prefix, missing)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)


class _Running:
    """A module during one call: its parts know the products of the call; everything else is the module's own.

    The products belong to the call: stored on the module, another thread or the next call would find them.
    """

    def __init__(self, module: nn.Module, products: dict[tuple[str, ...], Product]):
        # One by one instead of through __dict__, which torch.compile of torch 2.11 cannot trace.
        super().__setattr__("nm_act_module", module)
        for names, product in products.items():
            for name in names:
                super().__setattr__(name, partial(getattr(module, name), product=product))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.nm_act_module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.nm_act_module, name, value)


def _child_name(names: list[str]) -> str:
    return "merged_" + "_".join(name.removesuffix("_proj") for name in names)


def _split_state(merged: MergedLinear, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """State dict hook: stock names, each tensor contiguous in the stock layout."""
    parent = prefix.removesuffix(".").rpartition(".")[0]
    for kind in ("weight", "bias"):
        value = state.pop(f"{prefix}linear.{kind}", None)
        if value is None:
            continue
        for name, part in zip(merged.names, value.split(merged.sizes), strict=True):
            state[f"{parent}.{name}.{kind}" if parent else f"{name}.{kind}"] = part.contiguous()


def _join_state(parent: nn.Module, state: dict[str, Tensor], prefix: str, missing: list[str]) -> None:
    """Builds the merged tensors from the stock ones; a part that the state lacks is reported missing and unchanged."""
    for child, merged in parent.named_children():
        if not isinstance(merged, MergedLinear):
            continue
        for kind in ("weight", "bias"):
            value = parameter_of(merged.linear, kind)
            if value is None:  # torch reports what the state has for it
                continue
            names = [f"{prefix}{name}.{kind}" for name in merged.names]
            missing.extend(name for name in names if name not in state)
            kept = value.detach().split(merged.sizes)
            parts = [state.pop(name, part) for name, part in zip(names, kept, strict=True)]
            state[f"{prefix}{child}.linear.{kind}"] = torch.cat([part.to(parts[0].device) for part in parts])
