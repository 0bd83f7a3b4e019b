"""Counts the operators that a piece of code calls, with the path that each sparse product takes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..patterns import NMPattern
from .explain import Explanation, explain_call


@dataclass(frozen=True)
class Call:
    """An operator over tensors of some shapes."""

    op: str  # its name in ``torch.ops.nm_act``
    arguments: str  # the shapes of its tensors by name, with the dtype of the first, and the pattern
    explanation: Explanation | None = None
    """Of a sparse product what `nm_act.explain` would say; of any other operator nothing."""

    def __str__(self) -> str:
        text = f"{self.op}({self.arguments})"
        return text if self.explanation is None else f"{text}: {self.explanation}"


class Calls(Counter[Call]):
    """Call -> how often it was made, in order of first occurrence; printed one per line."""

    def __str__(self) -> str:
        lines = [f"{count} x {call}" for call, count in self.items()]
        return "\n".join(lines) or "no calls seen: those of compiled code and of CUDA graphs are not counted"


@contextmanager
def explain_calls() -> Iterator[Calls]:
    """Count the operators that the code within calls, with the path of each sparse product, why, and its kernel.

    Sparse products are :func:`nm_act.sparse_linear` and what an optimized model calls in its place: ``decode_linear``,
    ``sandwich_linear``, ``sparse_gemm``, ``sparse_gemm_silu_mul``, ``gather_linear`` and, on a CPU,
    ``sparse_linear_prepacked``. Sees code of any size in this thread, unless it is compiled or replayed by a CUDA
    graph.

    Examples
    --------
    >>> import torch, nm_act
    >>> layer = nm_act.NMLinear(64, 32, bias=False, spec=nm_act.LinearSpec("8:16"))
    >>> with nm_act.explain_calls() as calls:
    ...     y = layer(torch.zeros(2, 1, 64)), layer(torch.zeros(2, 9, 64))
    >>> for call, count in calls.items():
    ...     print(count, call.op, call.arguments, call.explanation.path)
    1 sparse_linear x [2, 1, 64] float32, weight [32, 64], 8:16 gather
    1 sparse_linear x [2, 9, 64] float32, weight [32, 64], 8:16 dense
    """
    with _Counting() as counting:
        yield counting.calls


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Calls()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))  # first, so that wrong arguments are refused by the operator
        if func.namespace == "nm_act":
            self.calls[_call(func, args, kwargs or {}, result)] += 1
        return result


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Call:
    declared = func._schema.arguments  # torch leaves arguments out that equal their defaults
    given = {each.name: each.default_value for each in declared}
    given |= dict(zip(given, args, strict=False)) | kwargs
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    texts = [f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()]
    dtype = next(iter(tensors.values())).dtype
    texts[0] += f" {str(dtype).removeprefix('torch.')}"
    op, pattern = func._schema.name.removeprefix("nm_act::"), None
    if "n" in given:
        pattern = NMPattern(given["n"], given["m"], given.get("extra_columns", ()))
        texts.append(str(pattern))
    return Call(op, ", ".join(texts), explain_call(op, given, pattern, result))
