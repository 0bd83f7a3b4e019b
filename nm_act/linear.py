"""NMLinear: a linear layer whose input activations are pruned N:M on the fly."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from . import criteria, ops, parallel
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

    Raises
    ------
    ValueError
        If the pattern's group does not divide ``in_features``, or the layout is unknown.

    Notes
    -----
    A call is *decode* if the input's next-to-last dimension is 1 (one token per sequence), else *prefill*;
    in a phase that the spec leaves out the layer is the dense ``F.linear``.

    ``channel_scale`` and ``shift_out`` derive from the weight and are not saved. They are recomputed by
    every ``.to()`` and ``load_state_dict``; call :meth:`refresh` after changing the weight in any other
    way. Where the weight is sharded (a DTensor), all of its ranks have to do so together.

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

    _hf_quantized_needs_local_tp = True  # Transformers' tensor parallelism then hands the layer plain tensors

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        spec: LinearSpec,
        weight_layout: str = "in_out",
        device=None,
        dtype=None,
    ):
        if in_features % spec.pattern.group:
            raise ValueError(
                f"expected in_features to be a multiple of the group {spec.pattern.group}, got "
                f"{in_features}; choose a pattern whose group divides it or keep the layer dense"
            )
        if weight_layout not in WEIGHT_LAYOUTS:
            raise ValueError(
                f"expected a weight layout among {', '.join(WEIGHT_LAYOUTS)}, got {weight_layout!r}; "
                "choose one of those"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.spec = spec
        self.weight_layout = weight_layout
        self.token_context: TokenContext | None = None
        self.shard: parallel.Shard | None = None
        self.register_buffer("channel_scale", None, persistent=False)
        self.register_buffer("shift_out", None, persistent=False)
        self.refresh()

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: LinearSpec, *, weight_layout: str = "in_out") -> "NMLinear":
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
            device="meta",
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer.refresh()
        return layer

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same (shared) parameters."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @torch.no_grad()
    def refresh(self) -> None:
        """Store the weight in its layout and recompute what derives from it; a meta weight stays as it is."""
        weight = self.weight
        if weight.is_meta:
            self.channel_scale = self.shift_out = None
            return
        if self.weight_layout == "in_out":
            stored = parallel.stored_in_out(weight)
            if stored is not weight:
                # A parameter of its own: whoever shares the old one keeps its layout.
                self.weight = nn.Parameter(stored, weight.requires_grad)
                weight = self.weight
        self.shard = parallel.shard_of(weight)
        self.channel_scale = parallel.whole_channel_scale(self.spec.criterion, weight, self.shard)
        if self.spec.token_shift != "none":
            # Of this rank's part: the row sums of a row-parallel layer add up as its outputs do.
            self.shift_out = parallel.local_weight(weight).sum(dim=1, dtype=torch.float64).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in] -> [..., out]``, sparse in the phases of the spec."""
        if self._is_dense_phase(x):
            return F.linear(x, self.weight, self.bias)
        if self.channel_scale is None and self.spec.criterion != "act":
            # Weights that accelerate keeps on disk or on another device are there for the first time.
            self.channel_scale = criteria.channel_scale(self.spec.criterion, self.weight)
        pattern = self.spec.pattern
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            # As F.linear does under autocast; the operator itself takes one dtype only.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
        # Ranks that see a slice of the features exchange what is a statistic of the whole token.
        by_row = self.shard is not None and self.shard.kind == "row"
        operator = partial(parallel.row_sparse_linear, self.shard) if by_row else ops.sparse_linear
        y = operator(
            x,
            weight,
            bias,
            pattern.keep,
            pattern.group,
            channel_scale=self.channel_scale,
            token_shift=self.spec.token_shift,
            shift_out=self.shift_out,
            variance_correction=self.spec.variance_correction,
        )
        if self.token_context is None:
            return y
        return self.token_context.overwrite_dense(y, x, lambda rows: F.linear(rows, self.weight, self.bias))

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
