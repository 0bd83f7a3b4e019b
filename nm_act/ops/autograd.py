"""Gradients of the compiled operators: straight through the selection, with the mask of the forward pass constant.

:mod:`nm_act.ops.gradients` has the formulas.

The backward pass keeps X and the weight and selects again, since the selection is deterministic to the bit. The forward
pass runs the same kernel with and without a gradient, so its values are the same bits.

Under torch.func and for forward-mode derivatives, :mod:`nm_act.ops.composed` replaces the operator; its values may
differ in rounding. Operators without a useful gradient (packed operands, 8-bit weights) refuse the backward pass.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..patterns import NMPattern
from . import composed, formulas
from .gradients import Selection, linear_gradients

Forward = Callable[..., Any]
"""The operator's kernel below autograd."""

_LIBRARY = torch.library.Library("nm_act", "FRAGMENT")
_RECORDING = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")
# ADInplaceOrView too: kernels shape their result with view, and autograd forbids in-place changes of a tracked view.
_RECORDED = reduce(operator.or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in _RECORDING))

WITHOUT_GRADIENT = {
    "compress": "nm_act.prune",
    "decompress": "nm_act.prune",
    "compress_packed": "nm_act.prune",
    "rms_norm_compress": "nm_act.prune of the norm",
    "silu_mul_compress": "nm_act.prune of the product",
    "rms_norm_prune": "nm_act.prune of the norm",
    "silu_mul_prune": "nm_act.prune of the product",
    "e4m3_product": "nm_act.sparse_linear",
    "rms_norm_add": "the norm of the model",
    "sparse_gemm": "nm_act.sparse_linear",
    "sparse_gemm_silu_mul": "nm_act.sparse_linear",
    "decode_linear": "nm_act.sparse_linear",
    "sandwich_linear": "nm_act.sparse_linear",
    "rotary": "the embedding of the model",
    "rotary_cache": "the embedding of the model",
    "decode_attention": "the attention of the model",
    "sparse_linear_prepacked": "nm_act.sparse_linear",
    "_packed_layer": "nm_act.sparse_linear",
    "_tune_gather": "nm_act.sparse_linear",
    "_tune_sparse_gemm": "nm_act.sparse_linear",
}
"""Operators without a gradient -> the function to use instead."""


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def trains(module: torch.nn.Module) -> bool:
    """Whether autograd records what is computed from a module's parameters."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())


def needs_derivative(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors, or one has a tangent (forward mode)."""
    return needs_gradient(*tensors) or (forward_ad._current_level >= 0 and _has_tangent(*tensors))


def refuse_backward(compute: Callable[[], Any], sentence: str, inputs: Iterable[Tensor | None]) -> Any:
    """``compute()``, recorded as a function of ``inputs`` whose backward pass raises a RuntimeError of one sentence.

    Under torch.func and in forward mode it is raised at once.
    """
    if not needs_derivative(*inputs):
        return compute()
    if _is_transformed(*inputs):
        raise RuntimeError(sentence)
    return _recorded(_Refused, compute, sentence, *inputs)


def unrecorded(operator: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """``operator(*args, **options)``, bypassing its autograd kernel if that has nothing to do.

    That kernel is Python and takes 4 µs per call, as long as the product of a small layer.
    """
    skipped = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
    if (
        skipped
        or torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return operator(*args, **options)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args, **options)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Any], sentence: str, *inputs: Tensor | None) -> Any:
        ctx.sentence = sentence
        return compute()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(ctx.sentence)


def _register(name: str, differentiable: Callable[..., Any]) -> None:
    """Register an operator's autograd kernel, which calls ``differentiable(forward, *args, **kwargs)`` if needed."""
    redispatch, behind = getattr(torch.ops.nm_act, name).default.redispatch, torch._C._after_autograd_keyset

    def forward(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_RECORDED):
            return redispatch(keyset & behind, *args, **kwargs)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            if needs_derivative(*tensors):
                return differentiable(partial(forward, keyset), *args, **kwargs)
        return forward(keyset, *args, **kwargs)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _recorded(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


def _has_tangent(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level < 0:  # the usual case, in every call of a layer
        return False
    floating = (tensor for tensor in tensors if tensor is not None and tensor.is_floating_point())
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in floating)


def _is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward mode asks for the derivative, which the Functions here do not support."""
    return torch._C._are_functorch_transforms_active() or _has_tangent(*tensors)


# ---- prune -----------------------------------------------------------------------------------------------------------
def _prune(
    forward: Forward,
    x: Tensor,
    n: int,
    m: int,
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
    extra_columns: Sequence[int] = (),
) -> Any:
    if _is_transformed(x, channel_scale, shift):
        z = formulas.shifted(x, shift, token_shift)
        return torch.where(
            composed.survivors(z, NMPattern(n, m, tuple(extra_columns)), channel_scale), z, z.new_zeros(())
        )
    options = {"n": n, "m": m, "token_shift": token_shift, "extra_columns": extra_columns}
    return _recorded(_Prune, forward, options, x, channel_scale, shift)


class _Prune(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        forward: Forward,
        options: dict[str, Any],
        x: Tensor,
        channel_scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        y: Tensor = forward(x, channel_scale=channel_scale, shift=shift, **options)
        ctx.save_for_backward(x, channel_scale, shift)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, _, needs_x, needs_scale, needs_shift = ctx.needs_input_grad
        x, channel_scale, shift = ctx.saved_tensors
        selection = Selection(x, channel_scale, shift, ctx.options)
        of_x = of_shift = None
        if needs_x or needs_shift:
            of_z = selection.masked(gradient.reshape(selection.x.shape))
            of_x = selection.through_eta(of_z, None).to(x.dtype).view(x.shape) if needs_x else None
            of_shift = -of_z.sum(dim=0, dtype=torch.float32).to(shift.dtype) if needs_shift else None
        return None, None, of_x, torch.zeros_like(channel_scale) if needs_scale else None, of_shift


# ---- sparse_linear ---------------------------------------------------------------------------------------------------
_VECTORS = ("channel_scale", "shift", "shift_out", "column_scale")


def _sparse_linear(
    forward: Forward,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    n: int = 2,
    m: int = 4,
    *,
    token_shift: str = "none",
    variance_correction: bool = False,
    weight_scale: Tensor | None = None,
    extra_columns: Sequence[int] = (),
    lifted_weight: Tensor | None = None,
    activation_dtype: torch.dtype | None = None,
    **given: Any,
) -> Any:
    options: dict[str, Any] = {"token_shift": token_shift, "variance_correction": variance_correction}
    pattern = {"n": n, "m": m, "extra_columns": extra_columns}
    vectors: dict[str, Any] = {name: given.get(name) for name in _VECTORS}
    tensors = (x, weight, bias, *vectors.values())
    if weight_scale is not None:
        options |= {"weight_scale": weight_scale, "activation_dtype": activation_dtype}
        return _refuse(
            "sparse_linear with weight_scale",
            "nm_act.sparse_linear with a weight in the dtype of x (nm_act.deoptimize gives such layers)",
            lambda: forward(x, weight, bias, **pattern, **vectors, **options),
            *tensors,
            weight_scale,
        )
    if _is_transformed(*tensors):
        return composed.sparse_linear(x, weight, bias, NMPattern(n, m, tuple(extra_columns)), **vectors, **options)
    # The lifted weight is a copy of the weight; the whole gradient goes to the weight.
    lifted = None if lifted_weight is None else lifted_weight.detach()
    return _recorded(_SparseLinear, forward, pattern | options, lifted, *tensors)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        forward: Forward,
        options: dict[str, Any],
        lifted: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *vectors: Tensor | None,
    ) -> Tensor:
        named = dict(zip(_VECTORS, vectors, strict=True))
        y: Tensor = forward(x, weight, bias, lifted_weight=lifted, **named, **options)
        ctx.save_for_backward(x, weight, *vectors)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        names = ("x", "weight", "bias", *_VECTORS)
        needs = dict(zip(names, ctx.needs_input_grad[3:], strict=True))
        with torch.autocast(gradient.device.type, enabled=False):
            gradients = linear_gradients(gradient, ctx.saved_tensors, ctx.options, needs)
        return None, None, None, *(gradients.get(name) for name in names)


# ---- gather_linear, dense_linear and the operators without a gradient ------------------------------------------------
def _gather_linear(
    forward: Forward, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, weight_scale: Tensor | None = None
) -> Any:
    if weight_scale is None:
        return _few_linear(forward, x, weight, bias)
    compute = partial(forward, x, weight, bias, weight_scale=weight_scale)
    return _refuse("gather_linear with a weight_scale", "the 16-bit weight", compute, x, bias)


def _few_linear(forward: Forward, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if _is_transformed(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    return _recorded(_FewLinear, forward, x, weight, bias)


class _FewLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Forward, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = forward(x, weight, bias)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):
            of_x = gradient @ weight if needs_x else None
            of_weight = (x.reshape(-1, x.shape[-1]).t() @ rows).t() if needs_weight else None
        return None, of_x, of_weight, rows.sum(dim=0) if needs_bias else None


def _refuse(what: str, instead: str, compute: Callable[[], Any], *inputs: Any) -> Any:
    sentence = (
        f"expected no gradient through nm_act::{what}, got an input that requires one; use {instead}, or detach its "
        "inputs"
    )
    return refuse_backward(compute, sentence, [each for each in inputs if isinstance(each, Tensor)])


def _refusing(name: str, instead: str) -> Callable[..., Any]:
    def differentiable(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        return _refuse(name, instead, lambda: forward(*args, **kwargs), *args, *kwargs.values())

    return differentiable


_register("prune", _prune)
_register("sparse_linear", _sparse_linear)
_register("gather_linear", _gather_linear)
_register("dense_linear", _few_linear)
for _name, _instead in WITHOUT_GRADIENT.items():
    _register(_name, _refusing(_name, _instead))


def refuse_gradient(name: str, instead: str) -> None:
    """Register the refusal for an operator that another module defines."""
    WITHOUT_GRADIENT[name] = instead
    _register(name, _refusing(name, instead))
