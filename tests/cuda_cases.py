"""Shared by the CUDA tests: when they run, poisoned memory, strided inputs, float64 oracles of the e4m3 operators."""

import pytest
import torch
import torch.nn.functional as F
from linear_cases import relative_error, stored

import nm_act
from nm_act import reference
from nm_act.ops.e4m3 import quantise_rows as quantise_weight

E4M3 = torch.float8_e4m3fn
HALVES = (torch.bfloat16, torch.float16)
DECODE_WEIGHTS = ("same", "e4m3", "int8")
KERNELS = torch.cuda.is_available() and bool(nm_act.build_info().get("cuda"))
WHY_NOT = "needs a CUDA device and compiled CUDA kernels"
GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not KERNELS, reason=WHY_NOT)]
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
HOPPER = pytest.mark.skipif(not IS_HOPPER, reason="needs compute capability 9.0")


def packed_layout(dtype: torch.dtype) -> str:
    """Name of the metadata layout that this device's sparse GEMM reads, by the dtype of the values."""
    if dtype == E4M3:
        return "sm90_8bit"
    return "sm90_16bit_t64" if torch.cuda.get_device_capability()[0] == 9 else "sm80_16bit"


def poison() -> None:
    """Leave NaNs (and illegal metadata nibbles) in the memory that torch's allocator hands out next."""
    sizes = [*[1 << 9] * 16, *[1 << 14] * 16, *[1 << 18] * 8, *[1 << 20] * 8, *[1 << 23] * 4, 1 << 26]
    blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in sizes]
    del blocks


def adds_after(call) -> bool:
    """Whether a call runs an addition of torch beside its kernel; the profiler sees those inside of operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = {event.name for event in profile.events()}
    assert any(name.startswith("nm_act::") for name in names), names
    return bool(names & {"aten::add", "aten::add_"})


def drawn(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def rms_norm(x, weight, eps, unit_offset=False):
    """As Transformers' modules compute it; with an offset, Gemma's."""
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * (1.0 + weight.float())).to(x.dtype) if unit_offset else weight * h.to(x.dtype)


def on_gpu(options: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def moved(vector: torch.Tensor) -> torch.Tensor:
    """The same values one element further, off the alignment of a vector load."""
    return torch.cat([vector[:1], vector])[1:]


def assert_legal(metadata: torch.Tensor) -> None:
    """Every nibble names two ascending indices, padding included."""
    nibbles = torch.stack([metadata & 15, metadata >> 4])
    assert ((nibbles & 3) < (nibbles >> 2)).all()


def assert_same_bytes(actual, expected, what="") -> None:
    """Tensors of any dtype, e4m3 too, one by one."""
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), what


def assert_within_twice_torch(y, x, weight, bias, pattern, options, what) -> None:
    """Against float64: at most twice the error of torch in the dtype of x, which gets the dequantised weight."""
    exact = reference.sparse_linear(x, weight, bias, pattern, **options)
    rest = {name: value for name, value in options.items() if name != "weight_scale"}
    dense = weight if "weight_scale" not in options else (weight.float() * options["weight_scale"][:, None]).to(x.dtype)
    if rest.keys() <= {"channel_scale"}:
        torchs = F.linear(reference.prune(x, pattern, **rest), dense, bias)
    else:
        torchs = reference.sparse_linear(x, dense, bias, pattern, compute_dtype=x.dtype, **rest)
    ours = relative_error(y, exact)
    assert y.dtype == x.dtype
    assert ours <= 2 * relative_error(torchs, exact), (what, ours)


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of ``x [tokens, in]`` in memory layouts that kernels must cope with."""
    tokens, in_features = x.shape
    wide = torch.full((tokens, in_features + 64), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 32 : 32 + in_features] = x
    # The row stride is even in elements but no multiple of 16 bytes, and neither is the start.
    odd = torch.full((tokens, in_features + 3), float("nan"), dtype=x.dtype, device=x.device)
    odd[:, 1 : 1 + in_features] = x
    twice = torch.full((2 * tokens, in_features), float("nan"), dtype=x.dtype, device=x.device)
    twice[::2] = x
    spread = torch.full((tokens, 2 * in_features), float("nan"), dtype=x.dtype, device=x.device)
    spread[:, ::2] = x
    return {
        "row stride": wide[:, 32 : 32 + in_features],
        "misaligned": odd[:, 1 : 1 + in_features],
        "every other row": twice[::2],
        "every other feature": spread[:, ::2],
        "transposed": x.t().contiguous().t(),
    }


def quantise_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of the e4m3 kernels: ``scale = amax * (1 / 448)``, ``e4m3(values * (1 / scale))``, all in float32."""
    inverse_max = torch.tensor(1 / 448, dtype=torch.float32, device=values.device)
    scale = values.float().abs().amax(dim=-1) * inverse_max
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (values.float() * (1 / scale)[:, None]).clamp(-448, 448).to(E4M3), scale


def sparse_linear_fp8_oracle(x, weight, weight_scale, bias=None, *, variance_correction=False, **options):
    """Float64 ``(nu * Q(P(X - eta)) @ W^T + E) * column_scale + bias``, W and Q(P) as the quantised values say."""
    shift, token_shift = options.get("shift"), options.get("token_shift", "none")
    pruned = reference.prune(
        x, "2:4", channel_scale=options.pop("channel_scale", None), shift=shift, token_shift=token_shift
    )
    quantised, scale = quantise_rows(pruned)
    operand = quantised.double() * scale.double()[:, None]
    if variance_correction:
        operand *= reference.variance_ratio(reference.shifted(x, shift, token_shift), pruned)
    return reference.linear_of_pruned(x, operand, weight, bias, weight_scale=weight_scale, **options)


def sparse_linear_fp8(x, weight, scale, bias=None, **options):
    """sparse_linear with e4m3 on both sides."""
    return nm_act.sparse_linear(x, weight, bias, weight_scale=scale, activation_dtype=E4M3, **options)


def problem(tokens, out_features, in_features, dtype=torch.bfloat16, layout="out_in"):
    """An activation, a weight and a bias on CUDA."""
    x = (torch.randn(tokens, in_features, device="cuda") + 0.2).to(dtype)
    weight = (torch.randn(out_features, in_features, device="cuda") / in_features**0.5).to(dtype)
    return x, stored(weight, layout), torch.randn(out_features, device="cuda").to(dtype)


def decode_problem(tokens, out_features, in_features, dtype=torch.bfloat16, kind="same", layout="in_out"):
    """x, weight, bias and the options that make the weight what ``kind`` says."""
    x = (torch.randn(tokens, in_features, device="cuda") + 0.2).to(dtype)
    weight = torch.randn(out_features, in_features, device="cuda") / in_features**0.5
    bias = torch.randn(out_features, device="cuda").to(dtype)
    if kind == "same":
        return x, stored(weight.to(dtype), layout), bias, {}
    weight, scale = quantise_weight(weight, E4M3 if kind == "e4m3" else torch.int8)
    return x, stored(weight, layout), bias, {"weight_scale": scale}


def decode_calls(x, weight, bias, options):
    """The operators of a decode step over one x, by name."""
    return {
        "plain": lambda: nm_act.sparse_linear(x, weight, bias, "8:16", **options),
        "mean": lambda: nm_act.sparse_linear(x, weight, bias, "8:16", token_shift="mean", **options),
        "variance": lambda: nm_act.sparse_linear(x, weight, bias, "8:16", variance_correction=True, **options),
        **({} if options else {"gather_linear": lambda: nm_act.gather_linear(x, weight, bias)}),
    }
