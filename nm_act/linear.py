"""NMLinear: a linear layer whose input activations are pruned N:M on the fly."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from . import autograd, composed, criteria, mitigations, ops, parallel, stale
from .lifting import begins_with_weight, lift_weight
from .patterns import NMPattern
from .recipe import LinearSpec
from .tokens import TokenContext

WEIGHT_LAYOUTS = ("in_out", "out_in")
"""How the weight [out, in] lies in memory: "in_out" stores one input channel's weights together."""

_DERIVED = ("channel_scale", "shift_out", "operand_weight", "operand_bias")
"""Buffers that refresh() computes."""

FOLLOW_WEIGHT = ("low_rank_in", "low_rank_out", "rotation")
"""Calibrated matrices: GEMM operands, so they have the weight's dtype; the vectors stay float32."""


class NMLinear(nn.Linear):
    """Linear layer ``Y = P(X) W^T + b`` with ``P`` the N:M selection of the input, in place of ``nn.Linear``.

    Its ``state_dict`` is that of the dense layer, so checkpoints move freely between the two; a mitigation that needs
    calibrated data (:data:`nm_act.mitigations.DATA`) adds that data to it.

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

    ``weight`` always is the dense one. What the operator reads derives from it and from the calibrated data and is not
    saved: ``channel_scale``, ``shift_out``, ``operand_bias``, and ``operand_weight`` where a method changes the weight
    (which then costs its memory a second time; a layer whose weight accelerate brings in for each call keeps only the
    vectors, and changes the weight in each call).

    It follows the weight. Every call sees a parameter set anew, lent by ``functional_call``, or changed by any
    operation that torch counts. A write through ``.data`` is not counted: after ``layer.weight`` was read (as LoRA
    merging does), or ``train()`` or ``eval()`` called, the next call compares a fingerprint of the weight, once. A
    write to ``.data`` that reached the weight otherwise (through ``parameters()``, or a reference kept since an earlier
    call) needs :meth:`refresh` or ``eval()``; so does any while the layer is compiled or in a CUDA graph, which has to
    be captured again. Where the weight is sharded (a DTensor), or brought in for each call, nothing is checked:
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
        self.differentiable = False
        self.bypass = False  # dense in every phase, while calibration takes the dense output
        self.shard: parallel.Shard | None = None
        self._underived = False  # the weight was not there yet: its first forward computes what derives from it
        self._visited = False  # the weight is there during a call only: what has its size is not kept either
        self._incomplete = ""  # calibrated data that is still missing
        self._handed_out = False  # somebody had a parameter in hand since the last check, and may have written to it
        self._unchecked = False  # train() or eval() was called since
        self._sources: dict[str, stale.Source] = {}  # the parameters that the derived data came from
        for name in _DERIVED:
            self.register_buffer(name, None, persistent=False)
        self._data_names = mitigations.data_of(spec)
        rank = mitigations.rank_of(spec.mitigation)
        for name in self._data_names:
            shape = mitigations.shape_of(name, in_features, out_features, rank)
            self.register_buffer(name, torch.full(shape, torch.nan, dtype=torch.float32, device=device))
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
        for name in layer._data_names:
            empty = torch.full_like(getattr(layer, name), torch.nan, device=linear.weight.device)
            setattr(layer, name, empty)
        layer.train(linear.training)
        layer.refresh()
        hook = getattr(linear, "_hf_hook", None)
        if hook is not None:  # accelerate's, which brings an offloaded weight in for each call
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(layer, hook)
        return layer

    def __getattr__(self, name: str):
        if name in ("weight", "bias"):  # asked for from outside: the layer itself reads _parameters
            self.__dict__["_handed_out"] = True
        return super().__getattr__(name)

    def _own(self, name: str) -> torch.Tensor | None:
        # Where torch's parametrize or prune computes it, it is no parameter but an attribute, new for each call.
        return self._parameters[name] if name in self._parameters else getattr(self, name)

    @property
    def _own_weight(self) -> torch.Tensor:
        return self._own("weight")

    def train(self, mode: bool = True) -> "NMLinear":
        """As ``nn.Module.train``; the next call also checks whether the weight was written to through ``.data``."""
        self._unchecked = True
        return super().train(mode)

    @property
    def lifted_weight(self) -> torch.Tensor | None:
        """The lifted weight of which ``weight`` is a view, or None: nothing is lifted, or the weight was set since."""
        return self._lifted[1] if self._lifted is not None and self._lifted[0] is self._own_weight else None

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same (shared) parameters."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @torch.no_grad()
    def refresh(self) -> None:
        """Store the weight in its layout and recompute what derives from it; a meta weight stays as it is."""
        weight = self._own_weight
        self._lifted, self._visited = None, False
        if weight.is_meta:
            for name in _DERIVED:
                setattr(self, name, None)
            self._underived = True
            return
        # A parameter of its own: whoever shares the old one keeps its layout.
        if self._lifts(weight):
            stored = parallel.stored_in_out(weight) if self.weight_layout == "in_out" else weight
            lifted = lift_weight(stored.detach(), self.spec.pattern)
            self.weight = nn.Parameter(lifted[:, : self.in_features], weight.requires_grad)
            weight = self._own_weight
            self._lifted = (weight, lifted)
        elif self.weight_layout == "in_out":
            stored = parallel.stored_in_out(weight)
            if stored is not weight:
                self.weight = nn.Parameter(stored, weight.requires_grad)
        self.shard = parallel.shard_of(self._own_weight)
        if self.shard is not None:
            kind, name = self.shard.kind, "this layer"
            parallel.check_split(name, self.spec, kind)
            part = parallel.part_of(name, self.spec, kind, self.in_features, self.out_features)
            parallel.check_size(self.shard.size, [part])
        self._set_derived()

    @torch.no_grad()
    def _set_derived(self) -> None:
        for name in FOLLOW_WEIGHT:
            if name in self._data_names:
                setattr(self, name, getattr(self, name).to(self._own_weight.dtype))
        self._incomplete = next((name for name, value in self.data().items() if value.isnan().any()), "")
        for name, value in self._derive().items():
            setattr(self, name, value)
        self._underived = self._handed_out = self._unchecked = False
        names = self._follows()
        self._sources = {name: stale.Source(self._own(name)) for name in names}

    def _follows(self) -> list[str]:
        """Names of the parameters that something derives from, if nobody else has to take part in deriving it."""
        if self.shard is not None:
            return []  # all ranks derive together, or none
        lifted = self._lifted is not None
        derives = mitigations.reads_weight(self.spec) or mitigations.has_shift(self.spec) or lifted
        names = ["weight"] if derives else []
        return names + (["bias"] if "added_bias" in self._data_names and self._own("bias") is not None else [])

    def _derived_for_call(self) -> dict[str, torch.Tensor | None] | None:
        """What derives from parameters lent for this call; None where what is stored holds, brought up to date."""
        if not self._sources or self._visited:
            return None
        if torch.compiler.is_compiling():  # a guard of the graph: nothing is known about the values there
            return self._derive() if self._handed_out else None
        seen = True
        for name, source in self._sources.items():  # in every call: spelt out, for its time
            seen = seen and source.is_seen_in(self._parameters.get(name))
        if seen and not self._handed_out and not self._unchecked:
            return None
        parameters = [(source, self._own(name)) for name, source in self._sources.items()]
        with _without_autocast(self._own_weight), torch.no_grad():
            if not all(stale.is_own(parameter) for _, parameter in parameters):
                return self._derive()
            if self._own_weight.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "expected a weight that no one has touched since the last call while a CUDA graph is captured, got "
                    "one that may have changed; call refresh() or the layer itself once before the capture"
                )
            with torch.inference_mode(False):  # what is kept has to serve training too
                if seen and all(source.is_equal_to(parameter) for source, parameter in parameters):
                    self._handed_out = self._unchecked = False
                else:
                    self._lift_again()
                    self._set_derived()
        return None

    def _lift_again(self) -> None:
        if self._lifted is None:
            return
        weight, lifted = self._lifted
        if weight is self._own_weight and weight.data_ptr() == lifted.data_ptr():
            lifted[:, self.in_features :] = lift_weight(weight.detach(), self.spec.pattern)[:, self.in_features :]
        else:  # another weight, of which no columns lie behind it
            self._lifted = None

    def data(self) -> dict[str, torch.Tensor]:
        """The calibrated data of this layer, by name; NaN where it has not been set yet."""
        return {name: getattr(self, name) for name in self._data_names}

    @torch.no_grad()
    def set_data(self, **data: torch.Tensor) -> None:
        """Set calibrated data and recompute what derives from it.

        Raises
        ------
        ValueError
            If this layer needs no data of that name, or its shape does not fit.
        """
        for name, value in data.items():
            known = self.data().get(name)
            if known is None or known.shape != value.shape:
                wanted = ", ".join(f"{key} {list(each.shape)}" for key, each in self.data().items()) or "none"
                raise ValueError(
                    f"expected calibrated data among {wanted}, got {name} {list(value.shape)}; it belongs to another "
                    "recipe or model"
                )
        for name, value in data.items():
            setattr(self, name, value.detach().to(known.device, torch.float32).contiguous())
        self.refresh()

    def _derive(self) -> dict[str, torch.Tensor | None]:
        """What the operator reads, by the names in _DERIVED; differentiable in the calibrated data."""
        if self._incomplete:
            return dict.fromkeys(_DERIVED)
        spec, data, mine = self.spec, self.data(), parallel.local_weight(self._own_weight)
        # A rank that holds a part derives from the whole as a single process does, bit for bit, and takes its part.
        whole = parallel.whole_weight(self._own_weight) if mitigations.reads_weight(spec) else mine
        v = mitigations.operand_weight(spec, whole, data)
        channel_scale = mitigations.selection_scale(spec, whole.detach(), v.detach(), data)
        operand = mine
        if v is not whole:
            part = self._part(v, ("out", "in"))
            operand = part.contiguous() if self.weight_layout == "out_in" else part.t().contiguous().t()
        local = self._local_data()
        return {
            "channel_scale": self._part(channel_scale, ("in",)),
            # Of this rank's part: a row-parallel layer's images add up as its outputs do.
            "shift_out": mitigations.shift_image(spec, operand, local),
            "operand_weight": None if v is whole else operand,
            "operand_bias": self._operand_bias(local),
        }

    def _operand_bias(self, data: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The bias with what calibration adds to it; None where that is nothing."""
        if "added_bias" not in data:
            return None
        added = data["added_bias"].to(self._own_weight.dtype)
        if self.shard is not None and self.shard.kind == "row":
            # Added once; the layer's own bias is the caller's to add, behind the sum over the ranks.
            return added if self.shard.rank == 0 else None
        return added if self._own("bias") is None else parallel.local_weight(self._own("bias")) + added

    def _part(self, tensor: torch.Tensor | None, axes: tuple[str, ...]) -> torch.Tensor | None:
        return tensor if self.shard is None or tensor is None else self.shard.part(tensor, axes)

    def _local_data(self) -> dict[str, torch.Tensor]:
        """The calibrated data, of a layer that is split over ranks this rank's part of it."""
        return {name: self._part(value, mitigations.DATA[name]) for name, value in self.data().items()}

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
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.dtype != self._own_weight.dtype and not autocast:
            raise TypeError(
                f"expected x in the dtype of the layer's weight, {self._own_weight.dtype}, got {x.dtype}; convert one of "
                "them, or run under torch.autocast"
            )
        if self._is_dense_phase(x):
            return F.linear(x, self._own_weight, self._own("bias"))
        self._check_ready()
        parallel.check_plain(x)
        if autocast:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        data = self._local_data()
        y = mitigations.add_low_rank(self._sparse(mitigations.in_basis(x, data), data), x, data)
        if self.token_context is None:
            return y
        return self.token_context.overwrite_dense(
            y, x, lambda rows: F.linear(rows, self._own_weight, self._own("bias"))
        )

    def _lifts(self, weight: torch.Tensor) -> bool:
        # Only the weight itself is lifted: not a part of it, and not where another one is multiplied in its place.
        if parallel.shard_of(weight) is not None or mitigations.replaces_weight(self.spec):
            return False
        if self.lift != "auto":
            return self.lift
        is_half = weight.dtype in (torch.bfloat16, torch.float16)
        return weight.is_cuda and is_half and len(self.spec.pattern.extra_columns) == 1

    def _sparse(self, x: torch.Tensor, data: dict[str, torch.Tensor]) -> torch.Tensor:
        """The operator on the input in the selection's basis."""
        derived = self._derived()
        if self._visited and mitigations.replaces_weight(self.spec) and derived["operand_weight"] is None:
            with _without_autocast(self._own_weight):
                derived["operand_weight"] = mitigations.operand_weight(
                    self.spec, self._own_weight.detach(), self.data()
                )
        weight = self._own_weight if derived["operand_weight"] is None else derived["operand_weight"]
        bias = self._own("bias") if derived["operand_bias"] is None else derived["operand_bias"]
        # As F.linear does under autocast; the operator itself takes one dtype only.
        lifted = self.lifted_weight if derived["operand_weight"] is None else None
        if autograd.needs_derivative(self._own_weight):
            lifted = None  # an optimizer changes the weight only, not the columns behind it
        weight, bias, lifted = (t if t is None else t.to(x.dtype) for t in (weight, bias, lifted))
        if self.spec.criterion in criteria.WEIGHT_PRUNING:
            return F.linear(x, weight, bias)
        options = mitigations.operator_options(self.spec, data) | {"shift_out": derived["shift_out"]}
        if isinstance(self.spec.pattern, NMPattern) and not self.differentiable:
            options |= {"extra_columns": self.spec.pattern.extra_columns, "lifted_weight": lifted}
        if self.spec.criterion == "clact" and x.ndim > 1:
            return self._by_sequence(x, weight, bias, derived["channel_scale"], options)
        return self._operator(x, weight, bias, derived["channel_scale"], options)

    def _derived(self) -> dict[str, torch.Tensor | None]:
        """What derives from the parameters, as stored; computed anew where a gradient goes to them through it."""
        mine = self._derived_for_call()
        stored = {name: getattr(self, name) for name in _DERIVED} if mine is None else mine
        follows = mitigations.reads_weight(self.spec) or mitigations.has_shift(self.spec)
        trained = follows and autograd.needs_derivative(self._own_weight)
        if trained and self.shard is not None:
            sentence = (
                f"expected a frozen weight in a layer that is split over ranks with {self.spec}, got one that requires "
                "a gradient; train the unsplit model"
            )
            refuse = partial(autograd.refuse_backward, sentence=sentence, inputs=(self._own_weight,))
            return {
                name: value if value is None else refuse(partial(value.view_as, value))
                for name, value in stored.items()
            }
        if self.differentiable or trained:
            with _without_autocast(self._own_weight):
                return self._derive()
        if autograd.needs_derivative(self._own("bias")):
            stored["operand_bias"] = self._operand_bias(self._local_data())
        return stored

    def _operator(self, x, weight, bias, channel_scale, options) -> torch.Tensor:
        pattern = self.spec.pattern
        if self.differentiable or not isinstance(pattern, NMPattern):
            return composed.sparse_linear(x, weight, bias, pattern, channel_scale=channel_scale, **options)
        # Ranks that see a slice of the features exchange what is a statistic of the whole token.
        by_row = self.shard is not None and self.shard.kind == "row"
        operator = partial(parallel.row_sparse_linear, self.shard) if by_row else ops.sparse_linear
        return operator(x, weight, bias, pattern.keep, pattern.group, channel_scale=channel_scale, **options)

    def _by_sequence(self, x, weight, bias, channel_scale, options) -> torch.Tensor:
        """CLACT: every sequence has a channel scale of its own, from this call's tokens."""
        # The number of sequences is spelt out: of no tokens at all, none could be inferred.
        sequences, valid = x.reshape(x.shape[:-2].numel(), *x.shape[-2:]), None
        if self.token_context is not None:
            sequences, valid = self.token_context.sequences(x, sequences)
        if sequences.shape[1] == 1:  # one token ranks its channels by themselves alone: act
            return self._operator(x, weight, bias, channel_scale, options)
        rows = []
        for index, tokens in enumerate(sequences):
            seen = tokens if channel_scale is None else tokens * channel_scale.to(x.dtype)
            scale = criteria.call_scale(seen, None if valid is None else valid[index])
            scale = scale if channel_scale is None else scale * channel_scale
            rows.append(self._operator(tokens, weight, bias, scale, options))
        # Not out_features: of a layer that is split over ranks, the weight here is a part.
        y = torch.stack(rows) if rows else x.new_empty((0, weight.shape[0]))
        return y.view(*x.shape[:-1], weight.shape[0])

    def _check_ready(self) -> None:
        if self._underived:  # the weight is there for the first time
            with _without_autocast(self._own_weight):
                self._set_derived()
            if hasattr(self, "_hf_hook"):  # and, from accelerate's disk or memory, for this call only
                self.operand_weight, self._visited = None, True
        if self._incomplete:
            raise RuntimeError(
                f"expected calibrated data for {self.spec}, got no {self._incomplete}; make it with nm-act calibrate "
                "and read it with nm_act.load_calibration, or leave the mitigation out"
            )

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
        return f"{super().extra_repr()}, {self.spec}"

    def _apply(self, fn, recurse=True):
        # Not left to fn: the vectors stay float32 in a bfloat16 model and follow the weight as it is stored.
        before = self.data()
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = getattr(self, name)
            if name not in FOLLOW_WEIGHT and after.dtype != value.dtype:
                setattr(self, name, value.to(after.device))
        self.refresh()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._own_weight
        if not keep_vars and self.shard is None and not weight.is_meta:
            # In torch's layout, without what a lifted weight has behind it: safetensors refuses any other.
            own = weight.detach() if self.lifted_weight is None else weight.detach().clone()
            destination[f"{prefix}weight"] = own.contiguous()

    def __getstate__(self):
        state = self.__dict__.copy()
        state["_sources"] = {}
        state["_handed_out"] = not all(s.is_seen_in(self._own(n)) for n, s in self._sources.items()) or (
            self._handed_out or self._unchecked
        )
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        # A copy of a lifted view is a tensor of its own, and what derives from a weight may be older than it.
        if self._lifted is not None or self._handed_out:
            self.refresh()
        elif self._follows() and not self._own_weight.is_meta:
            self._sources = {name: stale.Source(self._own(name)) for name in self._follows()}


def _without_autocast(weight: torch.Tensor) -> torch.autocast:
    """Inside, what derives from a weight is computed as it is while a model loads."""
    return torch.autocast(weight.device.type, enabled=False)


def _check_lift(lift: bool | str, pattern: NMPattern, in_features: int) -> None:
    if lift not in (True, False, "auto"):
        raise ValueError(f'expected lift to be True, False or "auto", got {lift!r}; choose one of those')
    if lift is not True:
        return
    if not isinstance(pattern, NMPattern):
        raise ValueError(f"expected an N:M pattern to lift the weight for, got {pattern}; leave lift out")
    if not begins_with_weight(pattern, in_features):
        raise ValueError(
            f"expected a pattern whose lifted weight begins with the weight, got {pattern}; pass lifted_weight to "
            "nm_act.sparse_linear instead"
        )
