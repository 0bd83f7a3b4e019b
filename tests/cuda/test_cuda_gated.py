"""Epilogues of the sparse GEMM with more than a layer in them: SiLU * up with its packing, and the residual."""

import re
from functools import partial

import pytest
import torch
from cuda_cases import E4M3, GPU_MARKS, HALVES, HOPPER, adds_after, assert_legal, assert_same_bytes, moved, poison

import nm_act
from nm_act import _C
from nm_act.ops.e4m3 import quantise_rows

pytestmark = [*GPU_MARKS, HOPPER]
OPS = torch.ops.nm_act
WIDE = {torch.bfloat16: "k128x256x64", torch.float16: "k128x256x64", E4M3: "k128x256x128E4M3"}
SIZES = [
    (1, 16, 32),
    (33, 48, 64),
    (64, 128, 256),
    (129, 272, 96),
    (385, 1280, 512),
    (700, 1040, 1024),
    (2048, 4096, 512),
]


def in_out(weight):
    return weight.t().contiguous().t()


def operand_and_weight(tokens, out_features, in_features, dtype=torch.bfloat16):
    """A packed operand, a weight in the storage that its kernel takes, and the weight's scale."""
    x = torch.randn(tokens, in_features, device="cuda").to(torch.bfloat16 if dtype == E4M3 else dtype)
    weight = torch.randn(out_features, in_features, device="cuda") * in_features**-0.5 * 1.5
    if dtype == E4M3:
        return nm_act.compress_packed(x, activation_dtype=E4M3), *quantise_rows(weight)
    return nm_act.compress_packed(x), in_out(weight.to(dtype)), None


def takes_wide_tile(dtype, *shape):
    """Whether the product of this shape runs on the tile whose epilogue adds the residual."""
    kind, multiprocessors = str(dtype).removeprefix("torch."), torch.cuda.get_device_properties(0).multi_processor_count
    plan = _C.select_gemm_plan(kind, *shape, multiprocessors, residual=True)
    name = next(tile["name"] for tile in _C.gemm_tiles(kind) if tile["tile"] == plan[0])
    return len(plan) == 6 and name == WIDE[dtype]


def wide_product(packed, weight, scale=None):
    """sparse_gemm with the tile of these epilogues, so that the sums are the same."""
    tiles = _C.gemm_tiles(str(weight.dtype).removeprefix("torch."))
    index = next(tile["tile"] for tile in tiles if tile["name"] == WIDE[weight.dtype])
    operand = packed.values, packed.metadata, packed.layout, weight, [index, 0, 1, 1, 0, 0]
    return OPS._tune_sparse_gemm(*operand, row_scale=packed.row_scale, column_scale=scale)


@pytest.mark.parametrize(("tokens", "outputs", "in_features"), SIZES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_packs_what_the_separate_kernels_pack(activation, dtype, tokens, outputs, in_features):
    packed, weight, _ = operand_and_weight(tokens, 2 * outputs, in_features, dtype)
    gate, up = wide_product(packed, weight).split(outputs, dim=-1)
    expected = nm_act.silu_mul_compress(gate, up, activation=activation)
    poison()
    actual = nm_act.sparse_gemm_silu_mul(packed, weight, activation=activation)
    assert_same_bytes(actual, expected)
    assert_legal(actual.metadata)
    facts = ("pattern", "in_features", "layout", "tokens", "hidden")
    assert [getattr(actual, fact) for fact in facts] == [getattr(expected, fact) for fact in facts]
    down = torch.randn(64, outputs, device="cuda").to(dtype)
    assert torch.equal(nm_act.sparse_gemm(actual, down), nm_act.sparse_gemm(expected, down))


def test_hard_values():
    """Infinities, NaNs, large and tiny gates take the same way through the epilogue as through memory."""
    packed, weight, _ = operand_and_weight(130, 128, 64)
    packed.values[3] = float("inf")
    packed.values[4] = float("nan")
    packed.values[5] *= 1e4
    packed.values[6] *= 1e-30
    gate, up = wide_product(packed, weight).split(64, dim=-1)
    assert_same_bytes(nm_act.sparse_gemm_silu_mul(packed, weight), nm_act.silu_mul_compress(gate, up))


@pytest.mark.sanitizer
def test_small_epilogues():
    packed, weight, _ = operand_and_weight(33, 96, 64)
    gate, up = wide_product(packed, weight).split(48, dim=-1)
    assert_same_bytes(nm_act.sparse_gemm_silu_mul(packed, weight), nm_act.silu_mul_compress(gate, up))
    for dtype in (torch.bfloat16, E4M3):
        packed, weight, scale = operand_and_weight(200, 256, 128, dtype)
        residual = torch.randn(200, 256, device="cuda").bfloat16()
        y = nm_act.sparse_gemm(packed, weight, column_scale=scale)
        assert torch.equal(nm_act.sparse_gemm(packed, weight, column_scale=scale, residual=residual), residual + y)


@pytest.mark.parametrize(
    ("tokens", "out_features", "wide"),
    [(1, 64, False), (300, 1024, False), (700, 2304, True), (2000, 2048, True), (1000, 4096, True)],
)
@pytest.mark.parametrize("dtype", [*HALVES, E4M3])
def test_residuals(dtype, tokens, out_features, wide):
    """With the tile that fuses it and with others, over either storage, with a bias: rounded before and after the sum."""
    packed, weight, scale = operand_and_weight(tokens, out_features, 2048, dtype)
    if torch.cuda.get_device_properties(0).multi_processor_count == 132:
        assert takes_wide_tile(dtype, tokens, out_features, 2048) == wide
    residual = torch.randn(tokens, out_features, device="cuda").to(torch.bfloat16 if dtype == E4M3 else dtype)
    bias, options = torch.randn(out_features, device="cuda").to(residual.dtype), {"column_scale": scale}
    shift_out = torch.randn(out_features, device="cuda")
    kept = residual.clone()
    for w in (weight, weight.contiguous()):  # the same for e4m3
        for b in (None, bias):
            for extra in ({}, {"shift_out": shift_out}):
                y = nm_act.sparse_gemm(packed, w, b, **options, **extra)
                poison()
                run = partial(nm_act.sparse_gemm, packed, w, b, **options, **extra)
                assert torch.equal(run(residual=residual), residual + y)
                fused = takes_wide_tile(dtype, tokens, out_features, 2048) and not extra
                fused = fused and (dtype == E4M3 or w.stride(0) == 1)
                assert adds_after(partial(run, residual=residual)) == (not fused)
                assert not adds_after(run)
    misaligned = moved(residual.flatten()).view_as(residual)
    expected = residual + nm_act.sparse_gemm(packed, weight, **options)
    assert torch.equal(nm_act.sparse_gemm(packed, weight, **options, residual=misaligned), expected)
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("dtype", [*HALVES, E4M3])
def test_epilogues_in_step(dtype):
    """Where the blocks of these kernels are kept in step: the bits of the same tile out of step."""
    shape = (4096, 8192, 19456) if dtype == E4M3 else (4224, 6144, 6656)
    if torch.cuda.get_device_properties(0).multi_processor_count == 132:
        assert _C.select_gemm_plan(str(dtype).removeprefix("torch."), *shape, 132, residual=True)[5]
    packed, weight, scale = operand_and_weight(*shape, dtype)
    residual = torch.randn(*shape[:2], device="cuda").to(torch.bfloat16 if dtype == E4M3 else dtype)
    product = wide_product(packed, weight, scale)
    poison()
    assert torch.equal(nm_act.sparse_gemm(packed, weight, column_scale=scale, residual=residual), residual + product)
    if dtype != E4M3:
        gate, up = product.split(shape[1] // 2, dim=-1)
        poison()
        assert_same_bytes(nm_act.sparse_gemm_silu_mul(packed, weight), nm_act.silu_mul_compress(gate, up))


def test_ten_runs_and_a_graph_give_the_same_bits():
    packed, weight, _ = operand_and_weight(600, 2048, 512)
    first = [part.clone() for part in nm_act.sparse_gemm_silu_mul(packed, weight)]
    for _ in range(9):
        poison()
        assert_same_bytes(nm_act.sparse_gemm_silu_mul(packed, weight), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = nm_act.sparse_gemm_silu_mul(packed, weight)
    captured.values.zero_()
    graph.replay()
    assert_same_bytes(captured, first)


def test_opcheck():
    packed, weight, _ = operand_and_weight(70, 128, 128)
    arguments = (packed.values, packed.metadata, packed.layout, weight)
    torch.library.opcheck(OPS.sparse_gemm_silu_mul.default, arguments)
    residual = torch.randn(70, 128, device="cuda").bfloat16()
    torch.library.opcheck(OPS.sparse_gemm.default, arguments, {"residual": residual})


def test_sentences():
    packed, weight, _ = operand_and_weight(16, 128, 64)
    q_packed, q_weight, _ = operand_and_weight(16, 128, 64, E4M3)
    x, residual = (torch.randn(16, n, device="cuda").bfloat16() for n in (64, 128))
    shifted, scaled = nm_act.compress_packed(x, token_shift="mean"), nm_act.compress_packed(x, variance_correction=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for error, words, call in (
        (ValueError, "without a per-token shift", lambda: nm_act.sparse_gemm_silu_mul(shifted, weight)),
        (ValueError, "without a per-token shift", lambda: nm_act.sparse_gemm_silu_mul(scaled, weight)),
        (ValueError, "expected activation", lambda: nm_act.sparse_gemm_silu_mul(packed, weight, activation="relu")),
        (TypeError, "expected 16-bit values", lambda: nm_act.sparse_gemm_silu_mul(q_packed, q_weight)),
        (NotImplementedError, "divisible by 16", lambda: nm_act.sparse_gemm_silu_mul(packed, weight[:-8])),
        (ValueError, "expected weight of shape", lambda: nm_act.sparse_gemm_silu_mul(packed, weight[:, :32])),
        (TypeError, "expected weight in the dtype", lambda: nm_act.sparse_gemm_silu_mul(packed, weight.half())),
        (NotImplementedError, "stored [in, out]", lambda: nm_act.sparse_gemm_silu_mul(packed, weight.contiguous())),
        (ValueError, "expected residual [16, 128]", lambda: nm_act.sparse_gemm(packed, weight, residual=residual[:8])),
        (ValueError, "expected residual", lambda: nm_act.sparse_gemm(packed, weight, residual=residual.half())),
        (ValueError, "residual", lambda: nm_act.sparse_gemm(packed, weight, residual=residual.cpu())),
    ):
        with pytest.raises(error, match=re.escape(words)):
            call()
    assert torch.cuda.memory_allocated() == before
