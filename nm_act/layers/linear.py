"""NMLinear: a linear layer whose input activations are pruned N:M on the fly."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .. import parallel
from ..ops.lifting import is_lifted
from ..patterns import NMPattern, TopKPattern
from ..recipe import LinearSpec
from .derived import FOLLOW_WEIGHT, Deriving
from .tokens import TokenContext

__all__ = ["FOLLOW_WEIGHT", "WEIGHT_LAYOUTS", "NMLinear"]

WEIGHT_LAYOUTS = ("in_out", "out_in")
"""How the weight [out, in] lies in memory: "in_out" stores one input channel's weights together."""


class NMLinear(Deriving):
    """Linear layer ``Y = P(X) W^T + b`` with ``P`` the N:M selection of the input, in place of ``nn.Linear``.

    Its ``state_dict`` is that of the dense layer, so checkpoints move freely between the two; a mitigation that needs
    calibrated data (:data:`nm_act.methods.mitigations.DATA`) adds that data to it.

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As in ``torch.nn.Linear``.
    spec : LinearSpec
        Pattern, criterion, mitigation and phase.
    weight_layout : str
        "in_out" (default) stores ``weight [out, in]`` with its input channels outermost (``weight.t()`` is
        contiguous), so that a decode step reads the rows of surviving inputs only; "out_in" keeps torch's
        own layout.
    lift : bool or str
        Keep the weight of a 2:4+1 layer lifted (:func:`nm_act.lift_weight`), of which ``weight`` is then a view: a
        quarter more memory. "auto" (default) does where the sparse tensor cores can use it: on CUDA, in 16 bits.

    Raises
    ------
    ValueError
        If the pattern's group does not divide ``in_features``, the layout is unknown, or ``lift`` is True for
        another pattern than 2:4+1.

    Notes
    -----
    A call is *decode* if the input's next-to-last dimension is 1 (one token per sequence), else *prefill*;
    in a phase that the spec leaves out the layer is the dense ``F.linear``.

    ``weight`` always is the dense one. What the operator reads derives from it and from the calibrated data and is not
    saved: ``channel_scale``, ``shift_out``, ``operand_bias``, and ``operand_weight`` where a method changes the weight
    (which then costs its memory a second time; a layer whose weight accelerate brings in for each call keeps only the
    vectors, and changes the weight in each call). From a weight that torch computes (``parametrize``) it derives in
    each call.

    It follows the weight. Every call sees a parameter set anew, lent by ``functional_call``, or changed by any
    operation that torch counts. A write through ``.data`` is not counted: after ``layer.weight`` was read (as LoRA
    merging does), or ``train()`` or ``eval()`` called, the next call compares a fingerprint of the weight, once. A
    write to ``.data`` that reached the weight otherwise (through ``parameters()``, or a reference kept since an earlier
    call) needs :meth:`refresh` or ``eval()``; so does any in a CUDA graph, which has to be captured again. A compiled
    layer cannot compare: once touched, each of its calls derives anew, until :meth:`refresh` or a call that is not
    compiled. Where the weight is sharded (a DTensor), or brought in for each call, nothing is checked:
    call :meth:`refresh`, of a sharded one on all of its ranks together.

    The layer trains: its gradient is straight through the selection, with the forward's mask as a constant, as in the
    training recipe of arXiv 2509.22166, and the forward computes the same bits as without one (a lifted weight is left
    aside, which on CUDA may round otherwise). While its weight requires a gradient, each call that autograd records
    derives again what derives from it. Calibration sets ``differentiable``.

    Examples
    --------
    >>> import torch
    >>> dense = torch.nn.Linear(32, 8)
    >>> layer = NMLinear.from_linear(dense, LinearSpec("2:4"))
    >>> layer(torch.randn(2, 5, 32)).shape
    torch.Size([2, 5, 8])
    """

    _hf_quantized_needs_local_tp = True  # Transformers' tensor parallelism then hands the layer plain tensors

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        spec: LinearSpec,
        weight_layout: str = "in_out",
        lift: bool | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if in_features % spec.pattern.span:
            raise ValueError(
                f"expected in_features to be a multiple of the group {spec.pattern.span}, got "
                f"{in_features}; choose a pattern whose group divides it or keep the layer dense"
            )
        if weight_layout not in WEIGHT_LAYOUTS:
            raise ValueError(
                f"expected a weight layout among {', '.join(WEIGHT_LAYOUTS)}, got {weight_layout!r}; "
                "choose one of those"
            )
        _check_lift(lift, spec.pattern)
        options: dict[str, Any] = {
            "spec": spec,
            "weight_layout": weight_layout,
            "lift": lift,
            "device": device,
            "dtype": dtype,
        }
        super().__init__(in_features, out_features, bias, **options)
        self.token_context: TokenContext | None = None
        self.bypass = False  # dense in every phase, while calibration takes the dense output
        self.refresh()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, spec: LinearSpec, *, weight_layout: str = "in_out", lift: bool | str = "auto"
    ) -> "NMLinear":
        """Sparse layer that takes over the parameters of a dense one, bias included.

        The dense layer is not changed. Parameters are shared where they can be: with
        ``weight_layout="in_out"`` the sparse layer has a reordered copy of the weight.

        Raises
        ------
        TypeError
            If ``linear`` is not exactly ``torch.nn.Linear`` (a quantised subclass, say).
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"expected a torch.nn.Linear, got {type(linear).__name__}; pass the dense layer")
        has_bias = linear.bias is not None
        layer = cls(
            linear.in_features,
            linear.out_features,
            has_bias,
            spec=spec,
            weight_layout=weight_layout,
            lift=lift,
            device="meta",
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        hook, device = getattr(linear, "_hf_hook", None), linear.weight.device
        aligning = [each for each in getattr(hook, "hooks", [hook]) if hasattr(each, "execution_device")]
        for each in aligning:  # accelerate's, which bring an offloaded weight in for each call
            device = device if each.execution_device is None else each.execution_device
            each.offload_buffers = False  # what it would bring in are the dense layer's: it has none
        for name in layer._data_names:
            setattr(layer, name, torch.full_like(getattr(layer, name), torch.nan, device=device))
        layer.train(linear.training)
        layer.refresh()
        if hook is not None:
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(layer, hook)
        return layer

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same (shared) parameters."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in] -> [..., out]``, sparse in the phases of the spec.

        Raises
        ------
        TypeError
            If ``x`` is no tensor, or outside of autocast not in the dtype of the weight.
        RuntimeError
            If calibrated data is missing.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"expected x as a torch.Tensor, got {type(x).__name__}; convert it with torch.as_tensor")
        weight, bias = self._own("weight"), self._own("bias")
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if x.dtype != weight.dtype and not autocast:
            raise TypeError(
                f"expected x in the dtype of the layer's weight, {weight.dtype}, got {x.dtype}; convert one of them, "
                "or run under torch.autocast"
            )
        if self._is_dense_phase(x):
            return F.linear(x, weight, bias)
        if type(x) is not torch.Tensor:
            parallel.check_plain(x)
        if autocast:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        context = self.token_context
        y = self.work(weight)(x, weight, bias, context)
        return y if context is None else context.overwrite_dense(y, x, lambda rows: F.linear(rows, weight, bias))

    def _is_dense_phase(self, x: torch.Tensor) -> bool:
        if self.bypass:
            return True
        if self.spec.phase == "both" or self.differentiable:
            return False
        # Branches, not a comparison of booleans: under torch.compile the size may be symbolic.
        if x.ndim == 1 or x.shape[-2] == 1:
            return self.spec.phase == "prefill"
        return self.spec.phase == "decode"

    def extra_repr(self) -> str:
        """Sizes and spec, for printing."""
        bias = self._own("bias") is not None  # nn.Linear's own would count as a reader of it
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.spec}"


def _check_lift(lift: bool | str, pattern: NMPattern | TopKPattern) -> None:
    if lift not in (True, False, "auto"):
        raise ValueError(f'expected lift to be True, False or "auto", got {lift!r}; choose one of those')
    if lift is True and not (isinstance(pattern, NMPattern) and is_lifted(pattern)):
        raise ValueError(f"expected 2:4+1 to lift the weight for, got {pattern}; leave lift out")
