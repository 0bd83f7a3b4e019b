"""The tensor-parallel sizes that a model's sparse layers allow."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..methods.mitigations import Spec, data_of
from ..patterns import NMPattern


@dataclass(frozen=True)
class Part:
    """Something that is split into equal parts, each of whole units."""

    name: str  # what it is, for the error: a layer's name, "attention heads"
    what: str  # what is counted: "in_features", "out_features", "heads"
    extent: int  # how many there are
    unit: int = 1  # how many must stay together: the pattern's group for the inputs of a row-parallel layer

    def fits(self, size: int) -> bool:
        """Whether no unit is cut by ``size`` equal parts."""
        return self.extent % (size * self.unit) == 0


def part_of(name: str, spec: Spec, kind: str, in_features: int, out_features: int) -> Part:
    """What is split in a "column" or "row" parallel layer of these sizes."""
    if kind == "row":
        return Part(name, "in_features", in_features, spec.span)
    return Part(name, "out_features", out_features)


def check_split(name: str, spec: Spec, kind: str) -> None:
    """Raise a ValueError if a layer with this :class:`~nm_act.LinearSpec` cannot be split that way.

    Calibrated data is split with the weight. If ranks see only a slice of a token's inputs, methods that compare or mix
    all of them cannot be split: unstructured top-k and a rotation.
    """
    if kind != "row" or spec.scoring.prunes_weight:
        return
    if "rotation" in data_of(spec):
        what = "a rotation (larosa), which mixes all in_features"
    elif not isinstance(spec.pattern, NMPattern):
        what = "top-k, which compares all in_features"
    else:
        return
    raise ValueError(
        f"expected {name}, whose in_features are split over ranks, without {what}, got {spec}; leave this layer out of "
        "the recipe, or run it on one rank"
    )


def check_size(size: int, parts: Iterable[Part]) -> None:
    """Raise a ValueError that names the first part that ``size`` ranks cannot share, and the sizes that work.

    Examples
    --------
    >>> check_size(2, [Part("down_proj", "in_features", 96, 16)])
    >>> check_size(4, [Part("down_proj", "in_features", 96, 16)])
    Traceback (most recent call last):
    ...
    ValueError: expected a tensor-parallel size among 1, 2, 3, 6, got 4, which would cut the 96 in_features of \
down_proj (in groups of 16); choose one of those sizes or another pattern
    """
    parts = list(parts)
    bad = next((part for part in parts if not part.fits(size)), None)
    if bad is None:
        return
    largest = min(part.extent // part.unit for part in parts)
    sizes = [each for each in range(1, largest + 1) if all(part.fits(each) for part in parts)]
    groups = f" (in groups of {bad.unit})" if bad.unit > 1 else ""
    remedy = "choose one of those sizes or another pattern" if bad.unit > 1 else "choose one of those sizes"
    raise ValueError(
        f"expected a tensor-parallel size among {', '.join(map(str, sizes))}, got {size}, which would cut the "
        f"{bad.extent} {bad.what} of {bad.name}{groups}; {remedy}"
    )
