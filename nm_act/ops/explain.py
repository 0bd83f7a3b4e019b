"""Says which path ``sparse_linear`` and the products around it take, and why, by the rules of the dispatch itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..patterns import NMPattern
from .legacy import takes_pattern
from .library import _C
from .lifting import is_lifted, lifted_features

PATHS = {
    "gather": "reads only the weight rows of survivors",
    "sparse": "2:4 on the sparse tensor cores",
    "lifted": "2:4 on the sparse tensor cores, over the lifted weight",
    "dense": "prunes, then runs torch's dense product",
    "prepacked": "prunes, then runs oneDNN's product over the prepacked weight",
}
"""Path -> what it does."""

_Facts = tuple[int, int, int, int, bool]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` or :func:`nm_act.explain_calls` found.

    Attributes
    ----------
    path : str
        One of ``PATHS``: "gather", "sparse", "lifted" or "dense"; of ``sparse_linear_prepacked`` also "prepacked".
    why : str
        The reason, with what would change it.
    device : str
        "cpu" or "cuda".
    kernel : str
        Configuration of the path's CUDA kernel; empty for "dense", on a CPU, and for a sparse GEMM on another compute
        capability than 9.0, which has no choice. For "gather": lanes, splits, threads and prefetching of the first
        launch (``csrc/kernels/gather/config.h``). For "sparse" and "lifted": the tile, the order of the tiles and
        splits, of both launches if the product is cut in two (``csrc/kernels/matmul/config.h``).
    """

    path: str
    why: str
    device: str
    kernel: str = ""

    def __str__(self) -> str:
        kernel = f" [{self.kernel}]" if self.kernel else ""
        return f"{self.path} on {self.device} ({PATHS[self.path]}): {self.why}{kernel}"


@takes_pattern
def explain(
    x: Tensor,
    weight: Tensor,
    pattern: NMPattern | str = "2:4",
    *,
    lifted_weight: Tensor | None = None,
    activation_dtype: torch.dtype | None = None,
    variance_correction: bool = False,
    device: str | None = None,
    compute_capability: int | None = None,
    multiprocessors: int | None = None,
) -> Explanation:
    """Tell which path :func:`nm_act.sparse_linear` takes for these arguments, and why.

    Nothing is computed: shapes, strides, dtypes and alignment decide. Meta tensors suffice, and options that do not
    affect the path (shifts, scales, bias) are not parameters.

    Parameters
    ----------
    x : Tensor [..., in_features]
    weight : Tensor [out_features, in_features]
    pattern, lifted_weight, activation_dtype, variance_correction
        As in :func:`nm_act.sparse_linear`.
    device : {"cpu", "cuda"}, optional
        Where the operator would run; by default the device of ``x``.
    compute_capability, multiprocessors : int, optional
        Major compute capability and number of multiprocessors of the CUDA device; by default those of the device of
        ``x``, or of an H200 if ``x`` is not on CUDA.

    Returns
    -------
    Explanation

    Raises
    ------
    TypeError
        If the dtype of x is not one of the operator's.
    ValueError
        If shapes, pattern or device do not fit.

    Examples
    --------
    >>> import torch, nm_act
    >>> print(nm_act.explain(torch.zeros(1, 64), torch.zeros(32, 64), "8:16").why)
    the weight is stored [out, in], so no row of it can be skipped; store it with weight.t().contiguous().t()
    """
    pattern = NMPattern(pattern)
    if device is None:
        device = "cpu" if x.device.type == "meta" else x.device.type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"expected the device cpu or cuda, got {device!r}; name one of them")
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"expected x [..., in_features] and weight [out_features, in_features], got {list(x.shape)} and "
            f"{list(weight.shape)}; transpose the weight or check the layer's input"
        )
    if x.shape[-1] == 0 or x.shape[-1] % pattern.span:
        raise ValueError(
            f"expected in_features divisible by {pattern.span} for {pattern}, got {x.shape[-1]}; choose another pattern"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"expected x in float32, bfloat16 or float16, got {x.dtype}; convert it first")
    if x.numel() == 0:
        return _nothing(device)
    lifted = None
    if lifted_weight is not None:
        if not is_lifted(pattern):
            raise ValueError(f"expected lifted_weight with 2:4+1 only, got it with {pattern}; leave it out")
        expected = [weight.shape[0], lifted_features(pattern, weight.shape[1])]
        if list(lifted_weight.shape) != expected:
            raise ValueError(
                f"expected lifted_weight of shape {expected} for {pattern}, got {list(lifted_weight.shape)}; use "
                "nm_act.lift_weight(weight, pattern)"
            )
        lifted = _facts(lifted_weight)
    of_device = (device, compute_capability, multiprocessors)
    return _choose(x, weight, pattern, of_device, lifted, activation_dtype, variance_correction)


def explain_call(
    op: str, given: Mapping[str, Any], pattern: NMPattern | None, y: Tensor | Sequence[Tensor]
) -> Explanation | None:
    """`explain` for a call of an operator, from its arguments by name and its result; None for other operators.

    For operators that an optimized model calls on CUDA, meta tensors stand for those of an H200.
    """
    if op in ("sparse_gemm", "sparse_gemm_silu_mul"):
        return _choose_packed(op, given, y if isinstance(y, Tensor) else y[0])
    if op == "sparse_linear" and pattern is not None:
        options = {name: given[name] for name in ("lifted_weight", "activation_dtype", "variance_correction")}
        return explain(given["x"], given["weight"], pattern, **options)
    if op not in ("decode_linear", "sandwich_linear", "gather_linear", "sparse_linear_prepacked"):
        return None
    x, device = given["x"], "cpu" if given["x"].is_cpu else "cuda"
    if x.numel() == 0:
        return _nothing(device)
    return _choose(x, given["weight"], pattern, (device, None, None), op=op)


def _nothing(device: str) -> Explanation:
    return Explanation("dense", "there are no tokens, so nothing runs", device)


def _choose_packed(op: str, given: Mapping[str, Any], y: Tensor) -> Explanation:
    values = given["values"]
    present = {name for name, value in given.items() if isinstance(value, Tensor) and value.numel()}
    path, why, kernel = _C.choose_packed(
        values.shape[0],
        _name(values.dtype),
        _name(y.dtype),
        _facts(given["weight"]),
        not present.isdisjoint(("eta", "shift_out")),
        not present.isdisjoint(("row_scale", "column_scale")),
        given.get("residual") is not None,
        op == "sparse_gemm_silu_mul",
        *_of_device(values, None, None),
    )
    return Explanation(path, why, "cuda", kernel)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _of_device(x: Tensor, compute_capability: int | None, multiprocessors: int | None) -> tuple[int, int]:
    """Major compute capability and multiprocessors: the given ones, those of x's device, or an H200's."""
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        compute_capability = compute_capability or properties.major
        multiprocessors = multiprocessors or properties.multi_processor_count
    return compute_capability or 9, multiprocessors or 132


def _choose(
    x: Tensor,
    weight: Tensor,
    pattern: NMPattern | None,
    of_device: tuple[str, int | None, int | None],
    lifted: _Facts | None = None,
    activation_dtype: torch.dtype | None = None,
    variance_correction: bool = False,
    op: str = "sparse_linear",
) -> Explanation:
    device, *facts = of_device
    path, why, kernel = _C.choose_path(
        device == "cuda",
        x.numel() // x.shape[-1],
        _name(x.dtype),
        *((0, 0, []) if pattern is None else (pattern.keep, pattern.group, list(pattern.extra_columns))),
        _facts(weight),
        lifted,
        *_of_device(x, *facts),
        _name(weight.dtype),
        _name(activation_dtype or x.dtype),
        variance_correction,
        op,
    )
    return Explanation(path, why, device, kernel)


def gathers(tokens: int, pattern: NMPattern, dtype: torch.dtype, device: torch.device, weight: Tensor) -> bool:
    """Whether :func:`nm_act.sparse_linear` skips rows of ``weight [out, in]`` for so many tokens on a CUDA device.

    A compiled call cannot ask the dispatch, and gets False for facts that no eager call asked about before. Nor can it
    see where a weight's storage begins: it assumes alignment to 16 bytes. For a weight that is not aligned,
    ``decode_linear`` then raises an error, and ``sparse_linear`` dispatches anew and prunes for a dense product.
    """
    if not torch.compiler.is_compiling() and weight.storage_offset() * weight.element_size() % 16:
        return False  # allocations are aligned further; a compiler cannot ask
    facts = (tokens, pattern, dtype, device.index, weight.dtype, *weight.shape, *weight.stride())
    known = _GATHERS.get(facts)
    if known is None and not torch.compiler.is_compiling():
        known = _GATHERS[facts] = _chooses_gather(tokens, pattern, dtype, device, weight)
    return bool(known)


_GATHERS: dict[tuple[Any, ...], bool] = {}
"""Facts of a call -> what :func:`gathers` found."""


def _chooses_gather(tokens: int, pattern: NMPattern, dtype: torch.dtype, device: torch.device, weight: Tensor) -> bool:
    facts = torch.cuda.get_device_properties(device)
    x = torch.empty(tokens, weight.shape[1], dtype=dtype, device="meta")
    of_weight = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
    options: dict[str, Any] = {"compute_capability": facts.major, "multiprocessors": facts.multi_processor_count}
    return explain(x, of_weight, pattern, device="cuda", **options).path == "gather"


def _facts(weight: Tensor) -> _Facts:
    """What the dispatch reads from a weight: sizes, strides, and whether the storage is aligned to 16 bytes."""
    start = weight.storage_offset() * weight.element_size() if weight.is_meta else weight.data_ptr()
    return *weight.shape, *weight.stride(), start % 16 == 0
