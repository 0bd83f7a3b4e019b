"""NMLinear: a linear layer whose input activations are pruned N:M on the fly."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .. import parallel
from ..methods import mitigations
from ..ops import autograd, composed
from ..ops.lifting import is_lifted
from ..patterns import NMPattern, TopKPattern, as_pattern
from ..recipe import LinearSpec
from .derived import DERIVED, FOLLOW_WEIGHT, Deriving, without_autocast
from .tokens import TokenContext
from .work import LinearWork, compiled_operator, dense_operator, is_decode, work_of

__all__ = ["FOLLOW_WEIGHT", "WEIGHT_LAYOUTS", "NMLinear", "sparse_layers"]

WEIGHT_LAYOUTS = ("in_out", "out_in")
"""Layout of the weight [out, in] in memory: "in_out" stores the weights of one input channel together."""


class NMLinear(Deriving):
    """Linear layer ``Y = P(X) W^T + b`` with ``P`` the N:M selection of the input, in place of ``nn.Linear``.

    Its ``state_dict`` is that of the dense layer, so checkpoints move freely between the two; a mitigation that needs
    calibrated data (:data:`nm_act.methods.mitigations.DATA`) adds that data to it.

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As in ``torch.nn.Linear``.
    spec : LinearSpec, NMPattern or str
        Pattern, criterion, mitigation and phase; or a pattern alone.
    weight_layout : str
        "in_out" (default) stores ``weight [out, in]`` with its input channels outermost (``weight.t()`` is contiguous),
        so that a decode step reads only the rows of surviving inputs; "out_in" keeps torch's layout.
    lift : bool or str
        Store the weight of a 2:4+1 layer lifted (:func:`nm_act.lift_weight`), with ``weight`` as a view of it; this
        takes a quarter more memory. "auto" (default): where the sparse tensor cores can use it, on CUDA in 16 bits.

    Raises
    ------
    ValueError
        If the pattern's group does not divide ``in_features``, the layout is unknown, or ``lift`` is True for a pattern
        other than 2:4+1.

    Notes
    -----
    A call is *decode* if the input's next-to-last dimension is 1 (one token per sequence), else *prefill*. In a phase
    that the spec leaves out, the layer computes the dense ``F.linear``.

    ``weight`` is always the dense weight. The operands derived from it and from the calibrated data are not saved:
    ``channel_scale``, ``shift_out``, ``operand_bias`` and, if a method changes the weight, ``operand_weight``, a second
    copy of the weight in memory (computed in each call if accelerate loads the weight for each call). If torch computes
    the weight (``parametrize``), all of them are computed in each call.

    Derived operands follow the weight. Every call notices a parameter that was assigned, substituted by
    ``functional_call``, or changed by an operation that increments its version counter. A write through ``.data`` does
    not increment it. Therefore, if ``layer.weight`` was read (as LoRA merging does), or ``train()`` or ``eval()`` was
    called, the next call compares a fingerprint of the weight once. After any other write to ``.data`` (through
    ``parameters()``, or a reference kept since an earlier call), call :meth:`refresh` or ``eval()``; with a CUDA graph,
    do so after every write, and capture the graph again. A compiled layer cannot compare: once its weight was read,
    each call derives the operands again, until :meth:`refresh` or a call that is not compiled. A weight that is sharded
    (a DTensor) or loaded for each call is not checked: call :meth:`refresh`, for a sharded one on all ranks together.

    The layer can be trained: the gradient is straight through the selection, with the forward's mask as a constant, as
    in the training recipe of arXiv 2509.22166. The forward computes the same bits with and without a gradient, except
    that with a gradient it does not use a lifted weight, which on CUDA may round differently. While the weight requires
    a gradient, every call that autograd records derives the operands again. Calibration sets ``differentiable``.

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
        spec: LinearSpec | NMPattern | str,
        weight_layout: str = "in_out",
        lift: bool | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        spec = spec if isinstance(spec, LinearSpec) else LinearSpec(as_pattern(spec))
        if in_features % spec.span:
            raise ValueError(
                f"expected in_features to be a multiple of the group {spec.span}, got "
                f"{in_features}; choose a pattern whose group divides it or keep the layer dense"
            )
        if weight_layout not in WEIGHT_LAYOUTS:
            raise ValueError(
                f"expected a weight layout among {', '.join(WEIGHT_LAYOUTS)}, got {weight_layout!r}; "
                "choose one of those"
            )
        _check_lift(lift, spec.pattern)
        layout: dict[str, Any] = {"weight_layout": weight_layout, "lift": lift}
        super().__init__(in_features, out_features, bias, spec=spec, device=device, dtype=dtype, **layout)
        self.token_context: TokenContext | None = None
        self.bypass = False  # dense in every phase, while calibration takes the dense output
        self.refresh()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        spec: LinearSpec | NMPattern | str,
        *,
        weight_layout: str = "in_out",
        lift: bool | str = "auto",
    ) -> "NMLinear":
        """Sparse layer that takes over the parameters of a dense one, bias included.

        The dense layer is not changed. Parameters are shared where they can be: with
        ``weight_layout="in_out"`` the sparse layer has a reordered copy of the weight.

        Raises
        ------
        TypeError
            If ``linear`` is not exactly ``torch.nn.Linear`` (a quantised subclass, say), or its weight is in float64.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"expected a torch.nn.Linear, got {type(linear).__name__}; pass the dense layer")
        if linear.weight.dtype == torch.float64:
            raise TypeError("expected a weight in float32, bfloat16 or float16, got float64; convert the layer first")
        options: dict[str, Any] = {"spec": spec, "weight_layout": weight_layout, "lift": lift, "device": "meta"}
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **options)
        layer.weight, layer.bias = linear.weight, linear.bias
        hook, device = getattr(linear, "_hf_hook", None), linear.weight.device
        aligning = [each for each in getattr(hook, "hooks", [hook]) if hasattr(each, "execution_device")]
        for each in aligning:  # accelerate's hooks, which load an offloaded weight for each call
            device = device if each.execution_device is None else each.execution_device
            each.offload_buffers = False  # the hook would load the dense layer's buffers, and there are none
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

    def work(self, weight: torch.Tensor) -> LinearWork:
        """The work of this call: the stored one, or a new one if parameters were substituted or are being trained.

        Raises
        ------
        RuntimeError
            If calibrated data is missing.
        """
        if self._underived or self._incomplete:
            self._check_ready()
        trained = autograd.needs_derivative(weight)
        if trained and self._reads_weight and self.shard is not None:
            return self._make_work(self._refusing_to_train(weight))
        if self.differentiable or (trained and self._reads_weight):
            with without_autocast(weight):
                return self._make_work(self._derive(), **self._copies(trained))
        # Training does not use the copies, so only an added bias can have changed.
        mine = self.derived_for_call() if self._adds_bias or not trained else None
        bias_trained = self._adds_bias and autograd.needs_derivative(self._own("bias"))
        replaced = self._visited and mitigations.replaces_weight(self.spec)
        if mine is None and not (trained or bias_trained or replaced):
            return self._stored_work()
        derived = {name: self._buffers[name] for name in DERIVED} if mine is None else dict(mine)
        if bias_trained:
            derived["operand_bias"] = self._operand_bias(self._local_data())
        if replaced and derived["operand_weight"] is None:
            with without_autocast(weight):
                derived["operand_weight"] = mitigations.operand_weight(self.spec, weight.detach(), self.data())
        return self._make_work(derived, **self._copies(trained))

    def _stored_work(self) -> LinearWork:
        stored = self._stored  # read once: another thread may refresh the layer
        if stored is None:
            return self._store_work()
        work, buffers = stored
        for name, value in buffers:  # accelerate moves buffers one by one
            if self._buffers[name] is not value:
                return self._store_work()
        return work

    def _store_work(self) -> LinearWork:
        buffers = [(name, self._buffers[name]) for name in (*DERIVED, *self._data_names)]
        work = self._make_work({name: value for name, value in buffers if name in DERIVED}, **self._copies())
        self._stored = work, buffers
        return work

    def _copies(self, trained: bool = False) -> dict[str, torch.Tensor | None]:
        if trained:  # an optimizer does not change them
            return {}
        return {"lifted_weight": self.lifted_weight, "prepacked_weight": self.prepacked_weight}

    def _make_work(self, derived: dict[str, torch.Tensor | None], **copies: torch.Tensor | None) -> LinearWork:
        spec, data = self.spec, self._local_data()
        operator: Callable[..., torch.Tensor]
        if spec.scoring.prunes_weight:
            operator, copies = dense_operator, {}
        elif self.differentiable or not isinstance(spec.pattern, NMPattern):
            operator, copies = composed.sparse_linear, {}
        else:
            # Ranks that see only a slice of the features exchange the statistics of the whole token.
            if self.shard is not None and self.shard.kind == "row":
                operator = partial(parallel.row_sparse_linear, self.shard)
            else:
                operator = compiled_operator
            if derived["operand_weight"] is not None:
                copies["lifted_weight"] = None
        return work_of(spec, data, operator, derived, **copies)

    def _refusing_to_train(self, weight: torch.Tensor) -> dict[str, torch.Tensor | None]:
        sentence = (
            f"expected a frozen weight in a layer that is split over ranks with {self.spec}, got one that requires a "
            "gradient; train the unsplit model"
        )
        refuse = partial(autograd.refuse_backward, sentence=sentence, inputs=(weight,))
        stored = {name: self._buffers[name] for name in DERIVED}
        return {
            name: value if value is None else refuse(partial(value.view_as, value)) for name, value in stored.items()
        }

    def _is_dense_phase(self, x: torch.Tensor) -> bool:
        if self.bypass:
            return True
        if self.spec.phase == "both" or self.differentiable:
            return False
        # Branches, not a comparison of booleans: under torch.compile the size may be symbolic.
        if is_decode(x):
            return self.spec.phase == "prefill"
        return self.spec.phase == "decode"

    def extra_repr(self) -> str:
        """Sizes and spec, for printing."""
        bias = self._own("bias") is not None  # nn.Linear's extra_repr would count as a reader of the bias
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.spec}"


def sparse_layers(model: nn.Module) -> dict[str, NMLinear]:
    """Name -> module of every sparse layer of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NMLinear)}


def _check_lift(lift: bool | str, pattern: NMPattern | TopKPattern) -> None:
    if lift not in (True, False, "auto"):
        raise ValueError(f'expected lift to be True, False or "auto", got {lift!r}; choose one of those')
    if lift is True and not (isinstance(pattern, NMPattern) and is_lifted(pattern)):
        raise ValueError(f"expected 2:4+1 to lift the weight for, got {pattern}; leave lift out")
