"""What optimize() did."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn


@dataclass
class OptimizeReport:
    """What :func:`nm_act.optimize` did.

    Attributes
    ----------
    model : nn.Module
        The given model, optimized.
    merged : list of (str, tuple of str)
        The parent of every merged layer, and the layers that were merged.
    fused : list of str
        Norms and MLPs that are computed with the product after them, or with the residual, on CUDA.
    linked : list of str
        Layers with norms on both sides (Gemma 3) whose last norm is computed with what the next layer begins with, on
        CUDA. Copies of the model, compiled calls, and calls in ``torch.inference_mode()`` outside a ``StaticDecoder``
        compute the two apart, as do layers that get hooks later.
    unlinked : list of (str, str)
        The other such layers that a layer follows, and why.
    fp8 : list of str
        Layers whose weight is now in e4m3.
    head : str
        The output head, if its weight is now in 8 bits.
    head_bytes, head_saved : int
        Memory that it now takes, and that it saves; the latter is negative if a tied embedding keeps the weight.
    dense : list of str
        Dense layers on a CPU, whose decode steps run on ``torch.ops.nm_act.dense_linear``.
    prepacked : list of str
        Layers that keep a second copy of their weight, in oneDNN's layout.
    prepacked_bytes : int
        Memory that these copies take.
    kept : list of (str, str)
        What was left unchanged, and why.
    """

    model: nn.Module
    merged: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    unlinked: list[tuple[str, str]] = field(default_factory=list)
    fp8: list[str] = field(default_factory=list)
    head: str = ""
    head_bytes: int = 0
    head_saved: int = 0
    dense: list[str] = field(default_factory=list)
    prepacked: list[str] = field(default_factory=list)
    prepacked_bytes: int = 0
    kept: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"merged: {len(self.merged)} groups"]
        lines += [f"  {' + '.join(names)}  x {count}" for names, count in Counter(n for _, n in self.merged).items()]
        lines.append(f"computed with the product after them, or with the residual, on CUDA: {len(self.fused)}")
        lines += [f"  {name}  x {count}" for name, count in Counter(map(_last, self.fused)).items()]
        if self.linked or self.unlinked:
            number = len(self.linked) + len(self.unlinked)
            lines.append(
                f"last norm computed with the next layer's first, on CUDA: {len(self.linked)} of {number} layers"
            )
            lines += [f"  not: {why}  x {count}" for why, count in Counter(why for _, why in self.unlinked).items()]
        if self.fp8:
            lines.append(f"e4m3 weights: {len(self.fp8)}")
        if self.head:
            less = self.head_saved / 2**20
            change = f"{less:.0f} MiB less than before" if less > 0 else "beside the weight of the tied embedding"
            lines.append(f"output head in 8 bits: {self.head}, {self.head_bytes / 2**20:.0f} MiB, {change}")
        if self.dense:
            lines.append(f"dense layers, faster for a few tokens on a CPU: {len(self.dense)}")
        if self.prepacked:
            mib = self.prepacked_bytes / 2**20
            lines.append(f"prepacked for oneDNN: {len(self.prepacked)}, a second copy of {mib:.0f} MiB")
        if self.kept:
            lines.append("as they were:")
            kept = Counter((_last(name), why) for name, why in self.kept)
            lines += [f"  {name}: {why}  x {count}" for (name, why), count in kept.items()]
        return "\n".join(lines)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
