"""The tensors that a sparse layer derives from its weight and its calibrated data, kept up to date with both."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from .. import parallel
from ..methods import mitigations
from ..ops.lifting import is_lifted, lift_weight
from ..ops.prepack import prepack_weight, why_not_prepacked
from ..patterns import NMPattern
from ..recipe import LinearSpec
from . import stale
from .work import LinearWork

DERIVED = ("channel_scale", "shift_out", "operand_weight", "operand_bias")
"""Buffers that refresh() computes."""

FOLLOW_WEIGHT = ("low_rank_in", "low_rank_out", "rotation")
"""Calibrated matrices, which are GEMM operands and have the weight's dtype; calibrated vectors stay float32."""


class Deriving(nn.Linear):
    """A linear layer with calibrated data, and with the tensors that its operator reads in place of the weight.

    The base class of :class:`nm_act.NMLinear`, which adds the forward pass and its work, and documents the parameters.
    """

    prepack = False
    """Whether to keep a second copy of the weight, in oneDNN's layout, for calls with too many tokens to skip rows, on
    CPUs; set it and call :meth:`refresh`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        spec: LinearSpec,
        weight_layout: str,
        lift: bool | str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._spec = spec
        self.weight_layout = weight_layout
        self.lift = lift
        # A tuple, because as an attribute the weight would be registered as a parameter twice.
        self._lifted: tuple[nn.Parameter, torch.Tensor, NMPattern] | None = None
        # The weight that the operator multiplies, and its copy in oneDNN's layout.
        self._prepacked: tuple[torch.Tensor, torch.Tensor] | None = None
        # The work of ordinary calls, and the buffers that it was made from.
        self._stored: tuple[LinearWork, list[tuple[str, torch.Tensor | None]]] | None = None
        self.differentiable = False
        self.shard: parallel.Shard | None = None
        self._underived = False  # the weight was not loaded yet: the first forward computes the derived tensors
        self._visited = False  # the weight is loaded for each call, so no derived tensors of its size are kept
        self._incomplete = ""  # calibrated data that is still missing
        self._handed_out = False  # a parameter was read from outside since the last check, and may have been written to
        self._unchecked = False  # train() or eval() was called since
        # The parameters that the derived tensors came from; None for one that is computed, or may have been swapped.
        self._sources: dict[str, stale.Source | None] = {}
        for name in DERIVED:
            self.register_buffer(name, None)
        self._data_names = mitigations.data_of(spec)
        self._reads_weight = mitigations.depends_on_weight(spec)
        self._adds_bias = "added_bias" in self._data_names
        rank = mitigations.rank_of(spec.mitigation)
        for name in self._data_names:
            shape = mitigations.shape_of(name, in_features, out_features, rank)
            self.register_buffer(name, torch.full(shape, torch.nan, dtype=torch.float32, device=device))

    @property
    def spec(self) -> LinearSpec:
        """How the layer is sparse; a new spec must need the same data, and its span must divide ``in_features``."""
        return self._spec

    @spec.setter
    def spec(self, spec: LinearSpec) -> None:
        same = mitigations.data_of(spec) == self._data_names and (
            mitigations.rank_of(spec.mitigation) == mitigations.rank_of(self._spec.mitigation)
        )
        if not same or self.in_features % spec.span:
            raise ValueError(
                f"expected a spec with the calibrated data of {self._spec} and a pattern that divides "
                f"{self.in_features} inputs, got {spec}; make another layer with "
                "NMLinear.from_linear(layer.to_linear(), spec)"
            )
        self._spec = spec
        self._reads_weight = mitigations.depends_on_weight(spec)
        self.refresh()

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):  # asked for from outside: the layer itself reads _parameters
            self.__dict__["_handed_out"] = True
        return super().__getattr__(name)

    def _own(self, name: str) -> Any:  # a tensor, or None for no bias
        return stale.parameter_of(self, name)

    @property
    def _own_weight(self) -> nn.Parameter:
        weight: nn.Parameter = self._own("weight")
        return weight

    def train(self, mode: bool = True) -> "Deriving":
        """As ``nn.Module.train``; the next call also checks whether the weight was written to through ``.data``."""
        self._unchecked = True
        return super().train(mode)

    @property
    def lifted_weight(self) -> torch.Tensor | None:
        """The lifted weight of which ``weight`` is a view; None if nothing is lifted, or the weight was set since."""
        return self._lifted[1] if self._lifted is not None and self._lifted[0] is self._own_weight else None

    @property
    def prepacked_weight(self) -> torch.Tensor | None:
        """The copy of the operand weight in oneDNN's layout; None if there is none, or the weight was set since."""
        return self._prepacked[1] if self._prepacked is not None and self._prepacked[0] is self._operand() else None

    def _operand(self) -> torch.Tensor:
        """The weight that the operator multiplies."""
        return self._own_weight if self.operand_weight is None else self.operand_weight

    @torch.inference_mode(False)  # what is kept has to serve training too
    @torch.no_grad()
    def refresh(self) -> None:
        """Store the weight in its layout and recompute what is derived from it; a meta weight stays as it is."""
        self._lifted, self._prepacked, self._visited, self._stored = None, None, False, None
        if self._own_weight.is_meta:
            self._keep(dict.fromkeys(DERIVED))
            self._sources, self._underived = {}, True
            return
        if self._parameters.get("weight") is not None:  # else it is computed, and its storage is not the layer's
            self._store(self._own_weight)
        self.shard = parallel.shard_of(self._own_weight)
        if self.shard is not None:
            kind, name = self.shard.kind, "this layer"
            parallel.check_split(name, self.spec, kind)
            part = parallel.part_of(name, self.spec, kind, self.in_features, self.out_features)
            parallel.check_size(self.shard.size, [part])
        self._set_derived()

    def _store(self, weight: nn.Parameter) -> None:
        """Put a weight of another layout, or one to be lifted, into a new parameter: others may share the old one."""
        stored = parallel.stored_in_out(weight) if self.weight_layout == "in_out" else weight
        pattern = self._lifted_pattern(weight)
        if pattern is not None:
            lifted = lift_weight(stored.detach(), pattern)
            self.weight = nn.Parameter(lifted[:, : self.in_features], weight.requires_grad)
            self._lifted = (self._own_weight, lifted, pattern)
        elif stored is not weight:
            self.weight = nn.Parameter(stored, weight.requires_grad)

    def _lifted_pattern(self, weight: torch.Tensor) -> NMPattern | None:
        """The pattern that the weight is lifted for, or None."""
        pattern = self.spec.pattern
        if not isinstance(pattern, NMPattern) or not is_lifted(pattern):
            return None
        # Only a whole weight is lifted, and only if no other weight is multiplied in its place.
        if parallel.shard_of(weight) is not None or mitigations.replaces_weight(self.spec):
            return None
        on_gpu_in_half = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        return pattern if (on_gpu_in_half if self.lift == "auto" else self.lift) else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def _set_derived(self) -> None:
        for name in FOLLOW_WEIGHT:
            if name in self._data_names:
                setattr(self, name, getattr(self, name).to(self._own_weight.dtype))
        self._incomplete = next((name for name, value in self.data().items() if value.isnan().any()), "")
        self._keep(self._derive())
        operand = self._operand()
        packs = self.prepack and self.shard is None and not why_not_prepacked(operand)
        self._prepacked = (operand, prepack_weight(operand)) if packs else None
        self._underived = self._handed_out = self._unchecked = False
        self._set_sources()
        if self.differentiable:  # its calls build their own work; the first ordinary one stores it
            self._stored = None
        else:
            self._store_work()

    def _keep(self, derived: dict[str, torch.Tensor | None]) -> None:
        for name, value in derived.items():
            setattr(self, name, value)
            # Checkpoints do not contain them. Those that are None are not listed: accelerate moves whatever is.
            (self._non_persistent_buffers_set.discard if value is None else self._non_persistent_buffers_set.add)(name)

    def _set_sources(self) -> None:
        """Remember the parameters that tensors are derived from, if no other rank has to take part in deriving them."""
        copied = self._lifted is not None or self._prepacked is not None
        names = ["weight"] if self._reads_weight or copied else []
        names += ["bias"] if self._adds_bias and self._own("bias") is not None else []
        if self.shard is not None:
            names = []  # all ranks derive together, or none
        parameters = {name: self._parameters.get(name) for name in names}
        self._sources = {name: p if p is None else stale.Source(p) for name, p in parameters.items()}

    def derived_for_call(self) -> dict[str, torch.Tensor | None] | None:
        """What is derived from parameters substituted for this call; None if the stored tensors, now updated, apply."""
        if not self._sources or self._visited:
            return None
        if torch.compiler.is_compiling():  # a guard of the graph; the values cannot be inspected here
            computed = any(self._parameters.get(name) is None for name in self._sources)
            return self._derive() if self._handed_out or computed else None
        seen = True
        for name, source in self._sources.items():  # spelt out, because it runs in every call
            seen = seen and source is not None and source.is_seen_in(self._parameters.get(name))
        if seen and not self._handed_out and not self._unchecked:
            return None
        with without_autocast(self._own_weight), torch.inference_mode(False), torch.no_grad():
            return self._brought_up_to_date(seen)

    def _brought_up_to_date(self, seen: bool) -> dict[str, torch.Tensor | None] | None:
        parameters = [(source, self._own(name)) for name, source in self._sources.items()]
        if not all(stale.is_own(parameter) for _, parameter in parameters):
            return self._derive()
        if torch._guards.detect_fake_mode() is not None:  # as in a compiled graph, and nothing may be kept
            return None if seen and not self._handed_out else self._derive()
        if self._own_weight.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "expected a weight that no one has touched since the last call while a CUDA graph is captured, got "
                "one that may have changed; call refresh() or the layer itself once before the capture"
            )
        if seen and all(source is not None and source.is_equal_to(parameter) for source, parameter in parameters):
            self._handed_out = self._unchecked = False
        else:
            self._lift_again()
            self._set_derived()
        return None

    def _lift_again(self) -> None:
        if self._lifted is None:
            return
        weight, lifted, pattern = self._lifted
        if weight is self._own_weight and weight.data_ptr() == lifted.data_ptr():
            lifted[:, self.in_features :] = lift_weight(weight.detach(), pattern)[:, self.in_features :]
        else:  # another weight, which has no lifted columns behind it
            self._lifted = None

    def _check_ready(self) -> None:
        if self._underived and not self._own_weight.is_meta:  # the weight is available for the first time
            with without_autocast(self._own_weight):
                self._set_derived()
            if hasattr(self, "_hf_hook"):  # accelerate loaded the weight for this call only
                self.operand_weight, self._prepacked, self._stored, self._visited = None, None, None, True
        if self._incomplete:
            raise RuntimeError(
                f"expected calibrated data for {self.spec}, got no {self._incomplete}; make it with nm-act calibrate "
                "and read it with nm_act.load_calibration, or leave the mitigation out"
            )

    def data(self) -> dict[str, torch.Tensor]:
        """The calibrated data of this layer, by name; NaN where it has not been set yet."""
        return {name: getattr(self, name) for name in self._data_names}

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_data(self, **data: torch.Tensor) -> None:
        """Set calibrated data and recompute what is derived; ValueError for a name or shape that does not fit."""
        for name, value in data.items():
            known = self.data().get(name)
            if known is None or known.shape != value.shape:
                wanted = ", ".join(f"{key} {list(each.shape)}" for key, each in self.data().items()) or "none"
                raise ValueError(
                    f"expected calibrated data among {wanted}, got {name} {list(value.shape)}; it belongs to another "
                    "recipe or model"
                )
        for name, value in data.items():
            value = value.clone() if value.is_inference() else value.detach()
            setattr(self, name, value.to(getattr(self, name).device, torch.float32).contiguous())
        self.refresh()

    def _store_work(self) -> LinearWork:
        """Make and store the work of ordinary calls from the derived tensors."""
        raise NotImplementedError

    def _derive(self) -> dict[str, torch.Tensor | None]:
        """The tensors that the operator reads, by the names in DERIVED; differentiable in the calibrated data."""
        if self._incomplete:
            return dict.fromkeys(DERIVED)
        spec, data, mine = self.spec, self.data(), parallel.local_weight(self._own_weight)
        # A rank that holds a part derives from the whole weight, bit for bit as a single process, and takes its part.
        whole = parallel.whole_weight(self._own_weight) if mitigations.reads_weight(spec) else mine
        v = mitigations.operand_weight(spec, whole, data)
        channel_scale = mitigations.selection_scale(spec, whole.detach(), v.detach(), data)
        operand = mine
        if v is not whole:
            part = self._part(v, ("out", "in"))
            operand = part.contiguous() if self.weight_layout == "out_in" else part.t().contiguous().t()
        local = self._local_data()
        return {
            "channel_scale": None if channel_scale is None else self._part(channel_scale, ("in",)),
            # From this rank's part: the images of a row-parallel layer add up as its outputs do.
            "shift_out": mitigations.shift_image(spec, operand, local),
            "operand_weight": None if v is whole else operand,
            "operand_bias": self._operand_bias(local),
        }

    def _operand_bias(self, data: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The bias plus the bias that calibration adds; None if it adds none."""
        if not self._adds_bias:
            return None
        added = data["added_bias"].to(self._own_weight.dtype)
        if self.shard is not None and self.shard.kind == "row":
            # Added by one rank; the caller adds the layer's own bias after the sum over the ranks.
            return added if self.shard.rank == 0 else None
        return added if self._own("bias") is None else parallel.local_weight(self._own("bias")) + added

    def _part(self, tensor: torch.Tensor, axes: tuple[str, ...]) -> torch.Tensor:
        return tensor if self.shard is None else self.shard.part(tensor, axes)

    def _local_data(self) -> dict[str, torch.Tensor]:
        """The calibrated data, or this rank's part of it if the layer is split over ranks."""
        if self.shard is None:
            return self.data()
        return {name: self._part(value, mitigations.DATA[name]) for name, value in self.data().items()}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Deriving":
        # fn alone does not suffice: vectors stay float32 in a bfloat16 model and follow the weight as it is stored.
        before = self.data()
        self._forget_sources()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            after = getattr(self, name)
            if name not in FOLLOW_WEIGHT and after.dtype != value.dtype:
                setattr(self, name, value.to(after.device))
        self.refresh()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_sources()
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _forget_sources(self) -> None:
        # torch.utils.swap_tensors, which torch may use to convert and load, refuses tensors with weak references.
        self._sources = dict.fromkeys(self._sources)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._parameters.get("weight")
        saved = f"{prefix}weight" in destination
        if saved and weight is not None and not keep_vars and self.shard is None and not weight.is_meta:
            # In torch's layout and without the columns of a lifted weight: safetensors refuses anything else.
            own = weight.detach() if self.lifted_weight is None else weight.detach().clone()
            destination[f"{prefix}weight"] = own.contiguous()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        sources = self._sources.items()
        seen = all(source is not None and source.is_seen_in(self._parameters.get(name)) for name, source in sources)
        state |= {
            "_sources": {},
            "_stored": None,
            "_prepacked": None,
            "_handed_out": not seen or self._handed_out or self._unchecked,
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "spec" in state:  # pickled by nm_act 0.1
            state = {**state, "_spec": state["spec"], "_stored": None}
            del state["spec"]
        state.setdefault("_prepacked", None)  # by nm_act 0.2
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A copied lifted view is a separate tensor, and derived tensors may be older than the weight.
        if self._lifted is not None or self._handed_out or self.prepack:
            self.refresh()
        elif not self._own_weight.is_meta:
            self._set_sources()


def without_autocast(weight: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which tensors are derived from a weight without autocast, as while a model loads."""
    return nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False)
