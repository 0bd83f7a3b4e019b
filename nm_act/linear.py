"""NMLinear: a linear layer whose input activations are pruned N:M on the fly."""

import torch
from torch import nn
from torch.nn import functional as F

from . import criteria, ops
from .lifting import lift_weight, lifted_columns
from .patterns import NMPattern
from .recipe import LinearSpec
from .tokens import TokenContext

WEIGHT_LAYOUTS = ("in_out", "out_in")
"""How the weight [out, in] lies in memory: "in_out" stores one input channel's weights together."""


class NMLinear(nn.Linear):
    """Linear layer ``Y = P(X) W^T + b`` with ``P`` the N:M selection of the input, in place of ``nn.Linear``.

    Its ``state_dict`` is that of the dense layer, so checkpoints move freely between the two.

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
        Keep the weight lifted (:func:`nm_act.lift_weight`), of which ``weight`` is then a view: a quarter more
        memory for 2:4+1, half more for the other patterns with windows. "auto" (default) does where the sparse
        tensor cores can use it with profit: on CUDA, in 16 bits, for 2:4+1.

    Raises
    ------
    ValueError
        If the pattern's group does not divide ``in_features``, the layout is unknown, or ``lift`` is True for a
        pattern whose lifted weight does not begin with the weight itself.

    Notes
    -----
    A call is *decode* if the input's next-to-last dimension is 1 (one token per sequence), else *prefill*;
    in a phase that the spec leaves out the layer is the dense ``F.linear``.

    ``channel_scale`` and ``shift_out`` derive from the weight and are not saved. They are recomputed by
    every ``.to()`` and ``load_state_dict``; call :meth:`refresh` after changing the weight in any other
    way.

    The layer is made for inference: the sparse operator has no gradient. A backward pass through it warns,
    and neither its parameters nor whatever feeds it receive one.

    Examples
    --------
    >>> import torch
    >>> dense = torch.nn.Linear(32, 8)
    >>> layer = NMLinear.from_linear(dense, LinearSpec("2:4"))
    >>> layer(torch.randn(2, 5, 32)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        spec: LinearSpec,
        weight_layout: str = "in_out",
        lift: bool | str = "auto",
        device=None,
        dtype=None,
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
        _check_lift(lift, spec.pattern, in_features)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.spec = spec
        self.weight_layout = weight_layout
        self.lift = lift
        # A tuple: as an attribute of its own the weight would be a parameter twice.
        self._lifted: tuple[nn.Parameter, torch.Tensor] | None = None
        self.token_context: TokenContext | None = None
        self.register_buffer("channel_scale", None, persistent=False)
        self.register_buffer("shift_out", None, persistent=False)
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
        layer.train(linear.training)
        layer.refresh()
        return layer

    @property
    def lifted_weight(self) -> torch.Tensor | None:
        """The lifted weight of which ``weight`` is a view, or None: nothing is lifted, or the weight was set since."""
        return self._lifted[1] if self._lifted is not None and self._lifted[0] is self.weight else None

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same (shared) parameters."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @torch.no_grad()
    def refresh(self) -> None:
        """Store the weight in its layout and recompute what derives from it; a meta weight stays as it is."""
        weight = self.weight
        self._lifted = None
        if weight.is_meta:
            self.channel_scale = self.shift_out = None
            return
        # A parameter of its own: whoever shares the old one keeps its layout.
        if self._lifts(weight):
            stored = weight.t().contiguous().t() if self.weight_layout == "in_out" else weight
            lifted = lift_weight(stored.detach(), self.spec.pattern)
            self.weight = nn.Parameter(lifted[:, : self.in_features], weight.requires_grad)
            weight = self.weight
            self._lifted = (weight, lifted)
        elif self.weight_layout == "in_out" and not weight.t().is_contiguous():
            self.weight = nn.Parameter(weight.t().contiguous().t(), weight.requires_grad)
            weight = self.weight
        self.channel_scale = criteria.channel_scale(self.spec.criterion, weight)
        if self.spec.token_shift != "none":
            self.shift_out = weight.sum(dim=1, dtype=torch.float64).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in] -> [..., out]``, sparse in the phases of the spec."""
        if self._is_dense_phase(x):
            return F.linear(x, self.weight, self.bias)
        if self.channel_scale is None and self.spec.criterion != "act":
            raise RuntimeError(
                f"expected a channel scale for the criterion {self.spec.criterion!r}, got none because the "
                "weight was set after the layer was made; call refresh()"
            )
        pattern = self.spec.pattern
        weight, bias, lifted = self.weight, self.bias, self.lifted_weight
        if torch.is_autocast_enabled(x.device.type):
            # As F.linear does under autocast; the operator itself takes one dtype only.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias, lifted = (t if t is None else t.to(dtype) for t in (x, weight, bias, lifted))
        y = ops.sparse_linear(
            x,
            weight,
            bias,
            pattern.keep,
            pattern.group,
            channel_scale=self.channel_scale,
            token_shift=self.spec.token_shift,
            shift_out=self.shift_out,
            variance_correction=self.spec.variance_correction,
            extra_columns=pattern.extra_columns,
            lifted_weight=lifted,
        )
        if self.token_context is None:
            return y
        return self.token_context.overwrite_dense(y, x, lambda rows: F.linear(rows, self.weight, self.bias))

    def _lifts(self, weight: torch.Tensor) -> bool:
        if self.lift != "auto":
            return self.lift
        is_half = weight.dtype in (torch.bfloat16, torch.float16)
        return weight.is_cuda and is_half and len(self.spec.pattern.extra_columns) == 1

    def _is_dense_phase(self, x: torch.Tensor) -> bool:
        if self.spec.phase == "both":
            return False
        # Branches, not a comparison of booleans: under torch.compile the size may be symbolic.
        if x.ndim == 1 or x.shape[-2] == 1:
            return self.spec.phase == "prefill"
        return self.spec.phase == "decode"

    def extra_repr(self) -> str:
        """Sizes and spec, for printing."""
        return f"{super().extra_repr()}, {self.spec}"

    def _apply(self, fn, recurse=True):
        # Not left to fn: the buffers stay float32 in a bfloat16 model and follow the weight as it is stored.
        super()._apply(fn, recurse)
        self.refresh()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lifted_weight is not None and not keep_vars:
            # Without the columns behind it: a file would hold the whole storage, and safetensors refuses such a view.
            destination[f"{prefix}weight"] = self.weight.detach().clone()

    def __setstate__(self, state):
        super().__setstate__(state)
        if self._lifted is not None:  # a copy of a view is a tensor of its own
            self.refresh()


def _check_lift(lift: bool | str, pattern: NMPattern, in_features: int) -> None:
    if lift not in (True, False, "auto"):
        raise ValueError(f'expected lift to be True, False or "auto", got {lift!r}; choose one of those')
    if lift is not True:
        return
    if not torch.equal(lifted_columns(pattern, in_features)[:in_features], torch.arange(in_features)):
        raise ValueError(
            f"expected a pattern whose lifted weight begins with the weight, got {pattern}; pass lifted_weight to "
            "nm_act.sparse_linear instead"
        )
