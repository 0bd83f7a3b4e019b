"""sparse_gemm_silu_mul: the bits of sparse_gemm and silu_mul_compress, in one kernel."""

import re

import pytest
import torch
from cuda_cases import E4M3, GPU_MARKS, HALVES, assert_legal, assert_same_bytes, poison
from linear_cases import relative_error

import nm_act
from nm_act import _C
from nm_act.optimize.fp8 import quantise_rows

pytestmark = [
    *GPU_MARKS,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="compute capability 9.0"
    ),
]
OPS = torch.ops.nm_act
TILES = {E4M3: "k128x256x128E4M3", None: "k128x256x64"}
SIZES = [
    (1, 16, 32),
    (33, 48, 64),
    (64, 128, 256),
    (129, 272, 96),
    (385, 1280, 512),
    (700, 1040, 1024),
    (2048, 4096, 512),
]


def operand_and_weight(tokens, outputs, in_features, dtype):
    """A packed operand, the weights of gate and up as the kernel takes them, and their scale."""
    x = torch.randn(tokens, in_features, device="cuda").to(torch.bfloat16 if dtype == E4M3 else dtype)
    weight = torch.randn(2 * outputs, in_features, device="cuda") * in_features**-0.5 * 1.5
    if dtype == E4M3:
        return nm_act.compress_packed(x, fp8=True), *quantise_rows(weight)
    return nm_act.compress_packed(x), weight.t().contiguous().t().to(dtype), None


def product(packed, weight, scale):
    """sparse_gemm with the tile of the fused kernel, so that the sums are the same."""
    tile = TILES[E4M3 if weight.dtype == E4M3 else None]
    index = next(t["tile"] for t in _C.gemm_tiles("e4m3" if weight.dtype == E4M3 else "bfloat16") if t["name"] == tile)
    options = {"row_scale": packed.row_scale, "column_scale": scale} if scale is not None else {}
    return OPS._tune_sparse_gemm(packed.values, packed.metadata, packed.layout, weight, [index, 0, 1, 1, 0], **options)


@pytest.mark.parametrize(("tokens", "outputs", "in_features"), SIZES)
@pytest.mark.parametrize("dtype", HALVES)
def test_packs_what_the_separate_kernels_pack(dtype, tokens, outputs, in_features):
    packed, weight, _ = operand_and_weight(tokens, outputs, in_features, dtype)
    gate, up = product(packed, weight, None).split(outputs, dim=-1)
    expected = nm_act.silu_mul_compress(gate, up)
    poison()
    actual = nm_act.sparse_gemm_silu_mul(packed, weight, compress=True)
    assert_same_bytes(actual, expected)
    assert_legal(actual.metadata)
    assert (actual.pattern, actual.in_features, actual.layout, actual.tokens, actual.hidden) == (
        *(expected.pattern, outputs, expected.layout, tokens),
        None,
    )
    down = torch.randn(64, outputs, device="cuda").to(dtype)
    assert torch.equal(nm_act.sparse_gemm(actual, down), nm_act.sparse_gemm(expected, down))


@pytest.mark.parametrize(("tokens", "outputs", "in_features"), SIZES)
@pytest.mark.parametrize("dtype", [*HALVES, E4M3])
def test_dense_results(dtype, tokens, outputs, in_features):
    packed, weight, scale = operand_and_weight(tokens, outputs, in_features, dtype)
    gate, up = product(packed, weight, scale).split(outputs, dim=-1)
    poison()
    z = nm_act.sparse_gemm_silu_mul(packed, weight, column_scale=scale)
    # The separate kernel's SiLU * up, without its selection: of a 2:4 operand whose survivors are all features.
    survivors = nm_act.silu_mul_compress(gate.contiguous(), up.contiguous())
    assert_same_bytes(nm_act.compress_packed(z), survivors)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    assert relative_error(z, exact) < 6e-3
    assert z.shape == (tokens, outputs)


def test_hard_values():
    """Infinities, NaNs, large and tiny gates take the same way through the epilogue as through memory."""
    packed, weight, _ = operand_and_weight(130, 64, 64, torch.bfloat16)
    packed.values[3] = float("inf")
    packed.values[4] = float("nan")
    packed.values[5] *= 1e4
    packed.values[6] *= 1e-30
    gate, up = product(packed, weight, None).split(64, dim=-1)
    assert_same_bytes(nm_act.sparse_gemm_silu_mul(packed, weight, compress=True), nm_act.silu_mul_compress(gate, up))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
def test_small_gated(dtype):
    packed, weight, scale = operand_and_weight(33, 48, 64, dtype)
    z = nm_act.sparse_gemm_silu_mul(packed, weight, column_scale=scale)
    gate, up = product(packed, weight, scale).split(48, dim=-1)
    assert relative_error(z, torch.nn.functional.silu(gate.float()) * up.float()) < 1e-2
    if dtype != E4M3:
        actual = nm_act.sparse_gemm_silu_mul(packed, weight, compress=True)
        assert_same_bytes(actual, nm_act.silu_mul_compress(gate, up))


def test_ten_runs_and_a_graph_give_the_same_bits():
    packed, weight, _ = operand_and_weight(600, 1024, 512, torch.bfloat16)
    first = [part.clone() for part in nm_act.sparse_gemm_silu_mul(packed, weight, compress=True)]
    for _ in range(9):
        poison()
        assert_same_bytes(nm_act.sparse_gemm_silu_mul(packed, weight, compress=True), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = nm_act.sparse_gemm_silu_mul(packed, weight, compress=True)
    captured.values.zero_()
    graph.replay()
    assert_same_bytes(captured, first)


def test_opcheck():
    for dtype in (torch.bfloat16, E4M3):
        packed, weight, scale = operand_and_weight(70, 64, 128, dtype)
        options = {"row_scale": packed.row_scale, "column_scale": scale} if dtype == E4M3 else {"compress": True}
        arguments = (packed.values, packed.metadata, packed.layout, weight)
        torch.library.opcheck(
            OPS.sparse_gemm_silu_mul.default,
            arguments,
            options,
            # torch's check of schemas multiplies the arguments, which it cannot in e4m3.
            test_utils=("test_autograd_registration", "test_faketensor", *(["test_schema"] if dtype != E4M3 else [])),
        )


def test_sentences():
    packed, weight, _ = operand_and_weight(16, 64, 64, torch.bfloat16)
    q_packed, q_weight, scale = operand_and_weight(16, 64, 64, E4M3)
    shifted = nm_act.compress_packed(torch.randn(16, 64, device="cuda").bfloat16(), token_shift="mean")
    scaled = nm_act.compress_packed(torch.randn(16, 64, device="cuda").bfloat16(), variance_correction=True)
    before = torch.cuda.memory_allocated()
    for error, words, call in (
        (ValueError, "without a per-token shift", lambda: nm_act.sparse_gemm_silu_mul(shifted, weight)),
        (ValueError, "expected row_scale and column_scale", lambda: nm_act.sparse_gemm_silu_mul(scaled, weight)),
        (ValueError, "expected row_scale and column_scale", lambda: nm_act.sparse_gemm_silu_mul(q_packed, q_weight)),
        (ValueError, "expected weight", lambda: nm_act.sparse_gemm_silu_mul(packed, weight[:-1])),
        (ValueError, "expected weight of shape", lambda: nm_act.sparse_gemm_silu_mul(packed, weight[:, :32])),
        (TypeError, "expected weight in the dtype", lambda: nm_act.sparse_gemm_silu_mul(packed, weight.half())),
        (
            TypeError,
            "expected 16-bit values to compress",
            lambda: nm_act.sparse_gemm_silu_mul(q_packed, q_weight, column_scale=scale, compress=True),
        ),
        (NotImplementedError, "stored [in, out]", lambda: nm_act.sparse_gemm_silu_mul(packed, weight.contiguous())),
    ):
        with pytest.raises(error, match=re.escape(words)):
            call()
    assert torch.cuda.memory_allocated() == before
