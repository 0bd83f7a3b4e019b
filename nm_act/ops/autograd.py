"""Gradients of the compiled operators: straight through the selection, with the mask of the forward as a constant.

``Y = (nu * (P(X - eta) @ W^T) + shift term) * column_scale + bias`` has, with ``G`` the gradient of Y,
``H = (G * column_scale) @ W`` and M the mask, the gradient ``nu * M * H`` in X - eta: one masked product. Statistics of
a token (nu, a mean) are functions of X and add their terms; a median passes its gradient to the element that it picked,
as in ``torch.median``. A channel scale only chooses: its gradient is 0.

What is kept for the backward pass is X and the weight. The selection is a function of X to the bit, so it is made again
instead of kept. The forward pass is the same kernel with and without a gradient, so its values are the same bits.

Under torch.func, and for forward-mode derivatives, the operator is :mod:`nm_act.ops.composed` instead, whose values may
differ in rounding. An operator whose result is no function that training could use (packed operands, 8-bit weights)
refuses the backward pass in one sentence.
"""

import operator
from collections.abc import Callable, Iterable
from functools import partial, reduce

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..patterns import NMPattern
from . import composed, formulas, operators

_LIBRARY = torch.library.Library("nm_act", "FRAGMENT")
_RECORDING = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")
# Views too: a kernel shapes its result with view, and one that is tracked could not be changed in place afterwards.
_RECORDED = reduce(operator.or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in _RECORDING))

WITHOUT_GRADIENT = {
    "compress": "nm_act.prune",
    "decompress": "nm_act.prune",
    "compress_packed": "nm_act.prune",
    "rms_norm_compress": "nm_act.prune of the norm",
    "silu_mul_compress": "nm_act.prune of the product",
    "sparse_gemm": "nm_act.sparse_linear",
    "_tune_gather": "nm_act.sparse_linear",
    "_tune_sparse_gemm": "nm_act.sparse_linear",
}
"""Operators without a gradient, and what has one in their place."""


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def needs_derivative(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors, or one has a tangent (forward mode)."""
    return needs_gradient(*tensors) or _has_tangent([tensor for tensor in tensors if tensor is not None])


def refuse_backward(compute: Callable, sentence: str, inputs: Iterable[Tensor | None]):
    """``compute()``, recorded as a function of ``inputs`` whose backward pass raises a RuntimeError of one sentence.

    Raises
    ------
    RuntimeError
        The same at once under torch.func and in forward mode.
    """
    if not needs_derivative(*inputs):
        return compute()
    if _is_transformed(*inputs):
        raise RuntimeError(sentence)
    return _Refused.apply(compute, sentence, *inputs)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, sentence, *inputs):
        ctx.sentence = sentence
        return compute()

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(ctx.sentence)


def _register(name: str, differentiable: Callable) -> None:
    """Autograd kernel of an operator: ``differentiable(forward, *args, **kwargs)`` where a derivative is asked for."""
    redispatch, behind = getattr(torch.ops.nm_act, name).default.redispatch, torch._C._after_autograd_keyset

    def forward(keyset, *args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_RECORDED):
            return redispatch(keyset & behind, *args, **kwargs)

    def kernel(keyset, *args, **kwargs):
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            if needs_derivative(*tensors):
                return differentiable(partial(forward, keyset), *args, **kwargs)
        return forward(keyset, *args, **kwargs)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _has_tangent(tensors: list[Tensor]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor.is_floating_point())


def _is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward mode asks for the derivative, which a Function here would not give."""
    if torch._C._are_functorch_transforms_active():
        return True
    return _has_tangent([tensor for tensor in tensors if tensor is not None])


# ---- the selection and its statistics, made again --------------------------------------------------------------------
class _Selection:
    """``Z = X - eta`` [tokens, in], its mask and survivors, and the way back from their gradients to X and eta."""

    def __init__(self, x, pattern, channel_scale, shift, token_shift):
        self.x, self.pattern, self.channel_scale = x, pattern, channel_scale
        self.shift, self.token_shift = shift, token_shift

    def prune(self) -> Tensor:
        """``P(Z)`` of the operator itself, the forward's to the bit."""
        options = {"channel_scale": self.channel_scale, "shift": self.shift, "token_shift": self.token_shift}
        return operators.prune(self.x, self.pattern, **options)

    def shifted(self) -> Tensor:
        return formulas.shifted(self.x, self.shift, self.token_shift)

    def masked(self, gradient: Tensor) -> Tensor:
        """The gradient of the survivors as one of Z."""
        mask = composed.survivors(self.shifted(), self.pattern, self.channel_scale)
        return torch.where(mask, gradient, gradient.new_zeros(()))

    def eta(self) -> Tensor:
        return formulas.token_shift_values(self.x, self.token_shift)

    def through_eta(self, of_z: Tensor, of_eta: Tensor | None) -> Tensor:
        """Gradient of X from those of Z and, where the token's eta is added again, of eta [tokens, 1]."""
        if self.token_shift == "none":
            return of_z
        wide = of_z.float()
        whole = (0 if of_eta is None else of_eta) - wide.sum(dim=-1, keepdim=True)
        if self.token_shift == "mean":
            return wide + whole / wide.shape[-1]
        picked = self.x.detach().float().median(dim=-1, keepdim=True).indices
        return wide + torch.zeros_like(wide).scatter(-1, picked, whole)


class _Variance:
    """nu = sqrt(Var Z / Var P) of a token [tokens, 1] and its gradient, float32."""

    def __init__(self, z: Tensor, pruned: Tensor):
        self.z, self.pruned = (each.double() - each.double().mean(dim=-1, keepdim=True) for each in (z, pruned))
        self.total, self.kept = (each.square().mean(dim=-1, keepdim=True) for each in (self.z, self.pruned))
        self.nu = formulas.ratio_root(self.total, self.kept).float()

    def gradients(self, of_nu: Tensor) -> tuple[Tensor, Tensor]:
        """Those of Z and of P: ``nu * (Z - mean Z) / (N Var Z)`` and ``-nu * (P - mean P) / (N Var P)`` times of_nu."""
        usable = (self.total != 0) & (self.kept != 0)
        factor = torch.where(usable, of_nu.double() * self.nu.double() / self.z.shape[-1], 0.0)
        total, kept = (torch.where(usable, each, 1.0) for each in (self.total, self.kept))
        return (self.z * (factor / total)).float(), (self.pruned * (-factor / kept)).float()


# ---- prune -----------------------------------------------------------------------------------------------------------
def _prune(forward, x, n, m, *, channel_scale=None, shift=None, token_shift="none", extra_columns=()):
    if _is_transformed(x, channel_scale, shift):
        z = formulas.shifted(x, shift, token_shift)
        return torch.where(composed.survivors(z, NMPattern(n, m, extra_columns), channel_scale), z, z.new_zeros(()))
    options = {"n": n, "m": m, "token_shift": token_shift, "extra_columns": extra_columns}
    return _Prune.apply(forward, options, x, channel_scale, shift)


class _Prune(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, options, x, channel_scale, shift):
        y = forward(x, channel_scale=channel_scale, shift=shift, **options)
        ctx.save_for_backward(x, channel_scale, shift)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, gradient):
        _, _, needs_x, needs_scale, needs_shift = ctx.needs_input_grad
        x, channel_scale, shift = ctx.saved_tensors
        selection = _selection(x, channel_scale, shift, ctx.options)
        of_x = of_shift = None
        if needs_x or needs_shift:
            of_z = selection.masked(gradient.reshape(selection.x.shape))
            of_x = selection.through_eta(of_z, None).to(x.dtype).view(x.shape) if needs_x else None
            of_shift = -of_z.sum(dim=0, dtype=torch.float32).to(shift.dtype) if needs_shift else None
        return None, None, of_x, torch.zeros_like(channel_scale) if needs_scale else None, of_shift


def _selection(x, channel_scale, shift, options) -> _Selection:
    pattern = NMPattern(options["n"], options["m"], options["extra_columns"])
    return _Selection(x.reshape(-1, x.shape[-1]), pattern, channel_scale, shift, options["token_shift"])


# ---- sparse_linear ---------------------------------------------------------------------------------------------------
def _sparse_linear(
    forward,
    x,
    weight,
    bias=None,
    n=2,
    m=4,
    *,
    channel_scale=None,
    shift=None,
    token_shift="none",
    shift_out=None,
    variance_correction=False,
    column_scale=None,
    weight_scale=None,
    extra_columns=(),
    lifted_weight=None,
    activation_dtype=None,
):
    options = {"token_shift": token_shift, "variance_correction": variance_correction, "extra_columns": extra_columns}
    vectors = {"channel_scale": channel_scale, "shift": shift, "shift_out": shift_out, "column_scale": column_scale}
    tensors = (x, weight, bias, *vectors.values())
    if weight_scale is not None:
        return _refuse(
            "sparse_linear with weight_scale",
            "nm_act.sparse_linear with a weight in the dtype of x (nm_act.deoptimize gives such layers)",
            lambda: forward(
                x,
                weight,
                bias,
                n,
                m,
                weight_scale=weight_scale,
                activation_dtype=activation_dtype,
                **vectors,
                **options,
            ),
            *tensors,
            weight_scale,
        )
    if _is_transformed(*tensors):
        del options["extra_columns"]
        return composed.sparse_linear(x, weight, bias, NMPattern(n, m, extra_columns), **vectors, **options)
    options |= {"n": n, "m": m}
    # The lifted weight is a copy of the weight, to which the whole gradient goes.
    lifted = None if lifted_weight is None else lifted_weight.detach()
    return _SparseLinear.apply(forward, options, lifted, *tensors)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, options, lifted, x, weight, bias, channel_scale, shift, shift_out, column_scale):
        y = forward(
            x,
            weight,
            bias,
            channel_scale=channel_scale,
            shift=shift,
            shift_out=shift_out,
            column_scale=column_scale,
            lifted_weight=lifted,
            **options,
        )
        ctx.save_for_backward(x, weight, channel_scale, shift, shift_out, column_scale)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, gradient):
        names = ("x", "weight", "bias", "channel_scale", "shift", "shift_out", "column_scale")
        needs = dict(zip(names, ctx.needs_input_grad[3:], strict=True))
        with torch.autocast(gradient.device.type, enabled=False):
            gradients = _linear_gradients(gradient, ctx.saved_tensors, ctx.options, needs)
        return None, None, None, *(gradients.get(name) for name in names)


def _linear_gradients(gradient: Tensor, saved: tuple, options: dict, needs: dict[str, bool]) -> dict[str, Tensor]:
    """Gradients by the operator's names, of those that are needed; no product is made for the others."""
    x, weight, channel_scale, shift, shift_out, column_scale = saved
    selection = _selection(x, channel_scale, shift, options)
    gradient = gradient.reshape(selection.x.shape[0], weight.shape[0])
    found = {}
    if needs["bias"]:
        found["bias"] = gradient.sum(dim=0)
    if needs["channel_scale"]:
        found["channel_scale"] = torch.zeros_like(channel_scale)
    if needs["column_scale"]:
        # In float32, as in the forward: in float16 the unscaled product may overflow.
        y = formulas.linear_of_pruned(
            selection.x,
            selection.prune(),
            weight,
            shift=shift,
            token_shift=options["token_shift"],
            shift_out=shift_out,
            variance_correction=options["variance_correction"],
            compute_dtype=torch.float32,
        )
        found["column_scale"] = (gradient.float() * y).sum(dim=0).to(column_scale.dtype)
    # From here on the gradient of nu * (P @ W^T) + shift term.
    if column_scale is not None:
        gradient = (gradient.float() * column_scale.float()).to(x.dtype)
    if not (needs["x"] or needs["weight"] or needs["shift"] or needs["shift_out"]):
        return found
    pruned = selection.prune() if needs["weight"] or options["variance_correction"] else None
    variance = _Variance(selection.shifted(), pruned) if options["variance_correction"] else None
    if needs["shift_out"]:
        eta = 1.0 if shift is not None else selection.eta()
        found["shift_out"] = (gradient.float() * eta).sum(dim=0).to(shift_out.dtype)
    if needs["weight"]:
        found["weight"] = _weight_gradient(gradient, pruned, variance, weight, selection, shift_out)
    if needs["x"] or needs["shift"]:
        _input_gradients(found, gradient, pruned, variance, weight, selection, shift_out, needs)
        found = {name: value for name, value in found.items() if needs[name]}
    if needs["x"]:
        found["x"] = found["x"].to(x.dtype).view(x.shape)
    return found


def _weight_gradient(gradient, pruned, variance, weight, selection, shift_out) -> Tensor:
    """``(nu * G)^T @ P``, in the weight's own order of memory, and the image's part where the operator makes it."""
    scaled = gradient if variance is None else (gradient.float() * variance.nu).to(gradient.dtype)
    is_in_out = weight.stride(0) == 1 and weight.stride(1) != 1
    product = (pruned.t() @ scaled).t() if is_in_out else scaled.t() @ pruned
    if shift_out is not None or (selection.shift is None and selection.token_shift == "none"):
        return product
    if selection.shift is not None:
        image = gradient.sum(dim=0, dtype=torch.float32)[:, None] * selection.shift.float()
    else:
        image = (gradient.float() * selection.eta()).sum(dim=0)[:, None]
    return product + image.to(product.dtype)


def _input_gradients(found, gradient, pruned, variance, weight, selection, shift_out, needs) -> None:
    """Put the gradients of x and of a static shift into ``found``."""
    product = gradient @ weight  # H
    if variance is None:
        of_z = selection.masked(product)
    else:
        of_nu = (pruned.float() * product.float()).sum(dim=-1, keepdim=True)
        through_z, through_pruned = variance.gradients(of_nu)
        of_z = selection.masked(product.float() * variance.nu + through_pruned) + through_z
    if needs["shift"]:
        of_shift = -of_z.sum(dim=0, dtype=torch.float32)
        if shift_out is None:
            of_shift = of_shift + product.sum(dim=0, dtype=torch.float32)
        found["shift"] = of_shift.to(selection.shift.dtype)
    if not needs["x"]:
        return
    of_eta = None
    if selection.token_shift != "none":
        image = product if shift_out is None else gradient.float() * shift_out.float()
        of_eta = image.sum(dim=-1, keepdim=True, dtype=torch.float32)
    found["x"] = selection.through_eta(of_z, of_eta)


# ---- gather_linear, dense_linear and the operators without a gradient ------------------------------------------------
def _few_linear(forward, x, weight, bias=None):
    if _is_transformed(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    return _FewLinear.apply(forward, x, weight, bias)


class _FewLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, x, weight, bias):
        y = forward(x, weight, bias)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):
            of_x = gradient @ weight if needs_x else None
            of_weight = (x.reshape(-1, x.shape[-1]).t() @ rows).t() if needs_weight else None
        return None, of_x, of_weight, rows.sum(dim=0) if needs_bias else None


def _refuse(what: str, instead: str, compute: Callable, *tensors):
    sentence = (
        f"expected no gradient through nm_act::{what}, got a derivative of it asked for; use {instead}, or detach its "
        "inputs"
    )
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    return refuse_backward(compute, sentence, tensors)


def _refusing(name: str, instead: str) -> Callable:
    def differentiable(forward, *args, **kwargs):
        return _refuse(name, instead, lambda: forward(*args, **kwargs), *args, *kwargs.values())

    return differentiable


_register("prune", _prune)
_register("sparse_linear", _sparse_linear)
_register("gather_linear", _few_linear)
_register("dense_linear", _few_linear)
for _name, _instead in WITHOUT_GRADIENT.items():
    _register(_name, _refusing(_name, _instead))
