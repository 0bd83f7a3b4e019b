"""Error mitigations: the data that each one needs, and what a layer derives from these data.

No mitigation has a forward of its own. Each one supplies an option of :func:`nm_act.sparse_linear` (a channel scale, a
shift and its image, a column scale, a bias), changes the weight that the operator reads (the *operand weight*), or
rotates the input in front of it:

``Y = (nu * P(T(X) - eta) @ V^T + shift term) * column_scale + bias + X @ (AB)^T``,  ``V = T(W - AB)``

==============  =============================================================  =====================================
name            definition                                                     data
==============  =============================================================  =====================================
var             ``nu = sqrt(Var Z / Var P(Z))`` per token                      –
dpts-mean       eta = the token's mean                                         –
dpts-median     eta = the token's (lower) median                               –
spts            eta [in] = the channels' means over calibration text           ``shift``
spts-scalar     one eta a layer, the mean of all its inputs                    ``shift``
lpts            eta [in], learned from 0                                       ``shift``
ls              ``column_scale = 1 + s`` and b' [out], learned from 0          ``column_scale``, ``added_bias``
rsparse-R       ``P(X)(W - AB)^T + X(AB)^T``, AB = the rank-R part of W's SVD  ``low_rank_in``, ``low_rank_out``
..-R-fit [ours] the same, AB = the rank-R part of W that sees the largest      the same
                output error of the selection over calibration text
..-trained      the same, A and B learned from there                           the same
pcs             ``P(X/s)(W*s)^T``, ``s_j = sqrt(max|X_j| / max|W_j|)``         ``smoothing``
larosa          ``P(XQ)(WQ)^T``, Q = eigenvectors of the inputs' covariance    ``rotation``
permute [ours]  an order of the input channels, folded into the neighbours     ``input_order``
==============  =============================================================  =====================================

pcs changes only the selection: in ``P(X/s)(W*s)^T`` the scales of a survivor cancel, so the layer keeps X and W and
selects with ``channel_scale / s`` (in e4m3, scaling the values would also change the rounding). The low-rank term is
computed outside the operator. It reads the dense input, so a kernel for the sparse operand could only run the same two
small GEMMs, and ``addmm`` already fuses the sum into the second. ``nu`` and ``column_scale`` do not scale it. A
criterion that reads the weight reads V, or W with ``-fit``. Shift images and row sums are computed from the operand
weight as stored.

Sources: arXiv 2509.22166 (VAR, shifts, LS), R-Sparse (arXiv 2504.19449), LaRoSA (arXiv 2507.01299).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..patterns import NMPattern, TopKPattern
from . import criteria


@dataclass(frozen=True)
class Observed:
    """What calibration knows about one layer when it computes the layer's data."""

    weight: torch.Tensor  # [out, in]
    mean: torch.Tensor  # [in], of the operand's channels, float32, in the basis of the selection
    largest: torch.Tensor  # [in], ``max|X_j|``
    covariance: torch.Tensor  # [in, in], of the inputs; this and the next only for a mitigation that names them
    lost: torch.Tensor  # [in, in], ``R`` of `fitted_low_rank_of`
    input_order: torch.Tensor  # [in], order that is folded into the weights
    rank: int  # of the low-rank pair; 0 is none


@dataclass(frozen=True)
class Mitigation:
    """A mitigation as data."""

    text: str  # what it does, in a few words
    data: tuple[str, ...] = ()  # names of the tensors in ``DATA`` that it needs from calibration
    # Those data in closed form, or where training starts from.
    start: Callable[[Observed], tuple[torch.Tensor, ...]] = lambda seen: ()
    matrices: tuple[str, ...] = ()  # those of "covariance" and "lost" that ``start`` reads
    learned: bool = False  # whether the data are trained
    slot: str = ""  # two mitigations of one slot exclude each other; "" excludes none
    token_shift: str = "none"  # per-token shift of the operator: "none", "mean" or "median"
    variance_correction: bool = False  # whether the operator rescales its output per token
    rank: int = 0  # of a low-rank pair; 0 is none


class Spec(Protocol):
    """The part of :class:`nm_act.LinearSpec` that this module reads."""

    @property
    def pattern(self) -> NMPattern | TopKPattern: ...
    @property
    def criterion(self) -> str: ...
    @property
    def mitigation(self) -> tuple[str, ...]: ...
    @property
    def scoring(self) -> criteria.Criterion: ...
    @property
    def methods(self) -> tuple[Mitigation, ...]: ...
    @property
    def token_shift(self) -> str: ...
    @property
    def span(self) -> int: ...


DATA: dict[str, tuple[str, ...]] = {
    "shift": ("in",),
    "column_scale": ("out",),
    "added_bias": ("out",),
    "low_rank_in": ("rank", "in"),
    "low_rank_out": ("out", "rank"),
    "smoothing": ("in",),
    "rotation": ("in", "in"),
    "input_order": ("in",),
    "input_norm": ("in",),
}
"""Calibrated tensor -> its axes; all are float32 (``input_order`` holds whole numbers)."""

MITIGATIONS = {
    "var": Mitigation("variance correction", variance_correction=True),
    "dpts-mean": Mitigation("per-token mean shift", slot="shift", token_shift="mean"),
    "dpts-median": Mitigation("per-token median shift", slot="shift", token_shift="median"),
    "spts": Mitigation("static shift, one value a channel", ("shift",), lambda seen: (seen.mean,), slot="shift"),
    "spts-scalar": Mitigation(
        "static shift, one value a layer",
        ("shift",),
        lambda seen: (seen.mean.mean().expand_as(seen.mean),),
        slot="shift",
    ),
    "lpts": Mitigation(
        "learned shift", ("shift",), lambda seen: (torch.zeros_like(seen.mean),), learned=True, slot="shift"
    ),
    "ls": Mitigation(
        "learned scale and bias",
        ("column_scale", "added_bias"),
        lambda seen: (seen.mean.new_ones(len(seen.weight)), seen.mean.new_zeros(len(seen.weight))),
        learned=True,
    ),
    "pcs": Mitigation(
        "smoothing", ("smoothing",), lambda seen: (smoothing_of(seen.largest, seen.weight),), slot="basis"
    ),
    "larosa": Mitigation(
        "rotation", ("rotation",), lambda seen: (rotation_of(seen.covariance),), ("covariance",), slot="basis"
    ),
    "permute": Mitigation("static order of the input channels", ("input_order",), lambda seen: (seen.input_order,)),
}
"""Mitigation name -> its data; in addition there is "rsparse-R" with any rank R, and its "-fit" and "-trained"."""

_LOW_RANK = re.compile(r"rsparse-([1-9]\d*)(-fit)?(-trained)?")


def mitigation(name: str) -> Mitigation:
    """The mitigation of that name; ValueError lists the known ones."""
    if isinstance(name, str):
        match = _LOW_RANK.fullmatch(name)
        if match:
            return Mitigation(
                f"rank {match[1]}",
                ("low_rank_in", "low_rank_out"),
                _fitted_pair if match[2] else _pair,
                ("lost",) if match[2] else (),
                learned=match[3] is not None,
                slot="low rank",
                rank=int(match[1]),
            )
        if name in MITIGATIONS:
            return MITIGATIONS[name]
    raise ValueError(
        f"expected mitigations among {', '.join(MITIGATIONS)}, rsparse-<rank>[-fit][-trained], got {name!r}; "
        "choose some of those"
    )


def check_mitigations(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names if each is known and they can be combined, else raise a ValueError of one sentence."""
    names = tuple(names)
    slots: dict[str, str] = {}
    for name in names:
        slot = mitigation(name).slot
        if slot and slot in slots:
            raise ValueError(f"expected at most one {_SLOTS[slot]}, got {slots[slot]} and {name}; remove one of them")
        if names.count(name) > 1:
            raise ValueError(f"expected every mitigation once, got {name} twice; remove one of them")
        slots[slot] = name
    if is_fitted(names) and "basis" in slots:
        raise ValueError(
            f"expected no change of the selection's basis beside a fitted low-rank pair, got {slots['basis']}; use "
            f"rsparse-{rank_of(names)} without -fit, or remove it"
        )
    return names


_SLOTS = {
    "shift": "shift (dpts-mean, dpts-median, spts, spts-scalar, lpts)",
    "basis": "change of the selection's basis (pcs, larosa)",
    "low rank": "low-rank pair (rsparse-R)",
}


def rank_of(names: Iterable[str]) -> int:
    """Rank of the low-rank pair among the mitigations, 0 without one."""
    return max((mitigation(name).rank for name in names), default=0)


def is_fitted(names: Iterable[str]) -> bool:
    """Whether the mitigations contain a low-rank pair that starts from the selection's error."""
    return any("lost" in mitigation(name).matrices for name in names)


def data_of(spec: Spec) -> tuple[str, ...]:
    """Names of the calibrated tensors that a :class:`~nm_act.LinearSpec` needs, in the order of ``DATA``."""
    needed = {*spec.scoring.data, *(name for each in spec.methods for name in each.data)}
    return tuple(name for name in DATA if name in needed)


def learned_data_of(spec: Spec) -> tuple[str, ...]:
    """Names of the calibrated tensors that training changes."""
    learned = {name for each in spec.methods if each.learned for name in each.data}
    return tuple(name for name in DATA if name in learned)


def shape_of(name: str, in_features: int, out_features: int, rank: int) -> tuple[int, ...]:
    """Shape of a calibrated tensor in a layer of these sizes."""
    sizes = {"in": in_features, "out": out_features, "rank": rank}
    return tuple(sizes[axis] for axis in DATA[name])


def replaces_weight(spec: Spec) -> bool:
    """Whether the operator multiplies by a weight other than the layer's own (:func:`operand_weight`)."""
    return spec.scoring.prunes_weight or not {"low_rank_in", "rotation"}.isdisjoint(data_of(spec))


def reads_weight(spec: Spec) -> bool:
    """Whether the selection or the operand weight is derived from the layer's whole weight."""
    return replaces_weight(spec) or spec.scoring.formula is not None


def has_shift(spec: Spec) -> bool:
    """Whether the operator reads the image of a shift (:func:`shift_image`)."""
    return spec.token_shift != "none" or "shift" in data_of(spec)


def depends_on_weight(spec: Spec) -> bool:
    """Whether an operand of the operator is derived from the weight or replaces it."""
    return reads_weight(spec) or has_shift(spec)


def operand_weight(spec: Spec, weight: torch.Tensor, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """The operand weight ``V [out, in]``; ``weight`` itself if no method changes it."""
    if spec.scoring.prunes_weight:
        return criteria.prune_weight(spec.criterion, weight, spec.pattern, data.get("input_norm"))
    v = weight
    if "low_rank_in" in data:
        # In float32: W - AB cancels.
        v = (v.float() - data["low_rank_out"].float() @ data["low_rank_in"].float()).to(weight.dtype)
    if "rotation" in data:
        v = (v.float() @ data["rotation"].float()).to(weight.dtype)
    return v


def selection_scale(
    spec: Spec, weight: torch.Tensor, v: torch.Tensor, data: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """Channel scale of the selection: the criterion's for the operand weight ``v``; with pcs, that for ``V*s`` over s.

    A fitted low-rank pair is computed from what the selection drops, so the selection must not depend on the pair: with
    ``-fit`` the criterion reads ``weight``, W.
    """
    read = weight if is_fitted(spec.mitigation) else v
    if "smoothing" not in data:
        return criteria.channel_scale(spec.criterion, read)
    smoothing = data["smoothing"]
    if spec.scoring.formula is None:
        return smoothing.reciprocal()
    scale = criteria.channel_scale(spec.criterion, read.float() * smoothing)
    return scale if scale is None else scale / smoothing


def shift_image(spec: Spec, v: torch.Tensor, data: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """For a static shift ``V @ eta``, for a per-token one the row sums ``V @ 1``, float32; None without a shift."""
    if spec.token_shift != "none":
        return v.sum(dim=1, dtype=torch.float64).float()
    if "shift" in data:
        return v.float() @ data["shift"].float()
    return None


def smoothing_of(input_max: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """PCS: ``s_j = sqrt(max|X_j| / max|W_j|)`` [in], float32; a maximum of 0 counts as 1."""
    weight_max = weight.float().abs().amax(dim=0)
    usable = (input_max > 0) & (weight_max > 0)
    ratio = torch.where(usable, input_max.float(), 1.0) / torch.where(usable, weight_max, 1.0)
    return ratio.sqrt()


def rotation_of(covariance: torch.Tensor) -> torch.Tensor:
    """LaRoSA: eigenvectors ``Q [in, in]`` (columns) of the inputs' covariance, the largest eigenvalue first."""
    vectors: torch.Tensor = torch.linalg.eigh(covariance.double()).eigenvectors
    return vectors.flip(-1).float()


def low_rank_of(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """R-Sparse: ``low_rank_in [rank, in]`` and ``low_rank_out [out, rank]``: W's best approximation of that rank."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root.unsqueeze(1) * v[:rank]).float(), (u[:, :rank] * root).float()


def fitted_low_rank_of(weight: torch.Tensor, lost: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The low-rank pair that minimises the output error of the selection [ours].

    ``AB = U U^T W`` with ``U [out, rank]`` the leading eigenvectors of ``W R W^T``: among all pairs of that rank it
    minimises ``E ||(X - P(X)) (W - AB)^T||^2`` (Eckart and Young, applied to the errors instead of the weight).

    ``lost [in, in]`` is ``R = E (X - P(X))^T (X - P(X))``, up to a factor. Returns ``low_rank_in [rank, in]`` and
    ``low_rank_out [out, rank]``, float32.
    """
    w, r = weight.double(), lost.double()
    if w.shape[0] <= w.shape[1]:
        u = torch.linalg.eigh(w @ r @ w.t()).eigenvectors[:, -rank:]
    else:  # the same through the smaller side: the leading right singular vectors of W R^(1/2), then their images
        values, vectors = torch.linalg.eigh(r)
        half = w @ (vectors * values.clamp_min(0.0).sqrt())
        u = torch.linalg.qr(half @ torch.linalg.eigh(half.t() @ half).eigenvectors[:, -rank:]).Q
    return (u.t() @ w).float(), u.float()


def _pair(seen: Observed) -> tuple[torch.Tensor, ...]:
    return low_rank_of(seen.weight, seen.rank)


def _fitted_pair(seen: Observed) -> tuple[torch.Tensor, ...]:
    return fitted_low_rank_of(seen.weight, seen.lost, seen.rank)
