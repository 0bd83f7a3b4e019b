"""Patterns with windows on CUDA: prune and compress_packed bit for bit against the oracle, the lifted product and dispatch."""

import pytest
import torch
from conftest import DTYPES, assert_same_bits, hard_activations
from cuda_cases import (
    E4M3,
    GPU_MARKS,
    HALVES,
    HOPPER,
    IS_HOPPER,
    assert_legal,
    assert_same_bytes,
    on_gpu,
    quantise_rows,
    strided,
)
from linear_cases import linear_options, relative_error, selections, stored

import nm_act
from nm_act import NMPattern, reference
from nm_act.ops.lifting import lifted_features

pytestmark = GPU_MARKS
LIFTED = ("2:4+1", "2:4+1@1", "2:4+1@2", "2:4+1@3")
EXTRAS = ((0,), (1,), (2,), (3,), (0, 1), (1, 3), (0, 3))


def unpacked(packed: nm_act.Packed) -> torch.Tensor:
    """The pruned activation that a lifted operand holds; its metadata must be legal, padding included."""
    assert_legal(packed.metadata)
    return packed.to_dense().cpu()


# ---- prune -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("tokens", [1, 33, 129])
def test_prune_equals_oracle(dtype, extra, tokens):
    for in_features in (16, 272, 1024):
        x = hard_activations(tokens, in_features, dtype, seed=tokens)
        for options in selections(in_features).values():
            pruned = nm_act.prune(x.cuda(), NMPattern(2, 4, extra), **on_gpu(options))
            assert_same_bits(pruned.cpu(), reference.prune(x, NMPattern(2, 4, extra), **options), any_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prune_of_strided_inputs(dtype):
    x = hard_activations(33, 272, dtype)
    expected = reference.prune(x, "2:4+1@2")
    for view in strided(x.cuda()).values():
        assert_same_bits(nm_act.prune(view, "2:4+1@2").cpu(), expected, any_nan=True)


# ---- compress_packed ---------------------------------------------------------------------------------------------------
# 64 and 832 leave the extra windows off the metadata's tiles; 640 ends within a block's span.
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("text", LIFTED)
@pytest.mark.parametrize("tokens", [1, 33, 300])
@pytest.mark.parametrize("in_features", [64, 640, 832, 4096])
def test_lifted_operand_holds_the_pruned_activation(dtype, text, tokens, in_features):
    if not IS_HOPPER and lifted_features(text, in_features) % 32:
        pytest.skip("no GEMM on this device takes such a row")
    pattern = NMPattern(text)
    x = hard_activations(tokens, in_features, dtype, seed=tokens)
    for options in selections(in_features).values():
        packed = nm_act.compress_packed(x.cuda(), pattern, **on_gpu(options))
        expected = reference.prune(x, pattern, **options)
        assert_same_bits(unpacked(packed), expected, any_nan=True)


@pytest.mark.parametrize("text", LIFTED)
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_packed_of_strided_inputs(text, activation_dtype):
    pattern, x = NMPattern(text), torch.randn(33, 384, device="cuda").bfloat16()
    expected = nm_act.compress_packed(x, pattern, activation_dtype=activation_dtype)
    for name, view in strided(x).items():
        assert_same_bytes(nm_act.compress_packed(view, pattern, activation_dtype=activation_dtype), expected, name)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("text", LIFTED)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("in_features", [128, 640, 4096, 28672])
def test_fp8_selects_before_it_quantises(dtype, text, tokens, in_features):
    pattern, x = NMPattern(text), torch.randn(tokens, in_features).to(dtype)
    x[0] *= 2.0**-10
    if tokens > 2:
        x[1], x[2] = torch.randint(-2, 3, (in_features,)), 0.0
    for name in ("plain", "channel scale", "mean"):
        options = selections(in_features)[name]
        packed = nm_act.compress_packed(x.cuda(), pattern, activation_dtype=E4M3, **on_gpu(options))
        values, scale = quantise_rows(reference.prune(x, pattern, **options))
        torch.testing.assert_close(packed.row_scale.cpu(), scale, rtol=2e-7, atol=0)
        actual = unpacked(packed).view(torch.uint8)
        # A pruned value is +0; a survivor that rounds to zero keeps its sign.
        assert torch.equal(actual, values.view(torch.uint8))


@pytest.mark.parametrize("text", LIFTED)
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_variance_factor(text, activation_dtype):
    pattern, x = NMPattern(text), (torch.randn(65, 1024) + 0.25).bfloat16()
    packed = nm_act.compress_packed(x.cuda(), pattern, activation_dtype=activation_dtype, variance_correction=True)
    pruned = reference.prune(x, pattern)
    expected = reference.variance_ratio(x, pruned).squeeze(-1)
    if activation_dtype:
        expected = expected * quantise_rows(pruned)[1].double()
    else:
        assert_same_bits(unpacked(packed), pruned)
    torch.testing.assert_close(packed.row_scale.cpu().double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("text", LIFTED)
def test_no_tokens(text):
    packed = nm_act.compress_packed(torch.zeros(0, 128, dtype=torch.bfloat16, device="cuda"), text)
    assert packed.values.shape == (0, lifted_features(text, 128) // 2)


# ---- the product ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("text", LIFTED)
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_lifted_gemm(dtype, text, layout):
    pattern, x = NMPattern(text), torch.randn(300, 1024, device="cuda").to(dtype)
    weight = stored(torch.randn(256, 1024, device="cuda").to(dtype), layout)
    lifted = nm_act.lift_weight(weight, pattern)
    assert stored(lifted, layout).stride() == lifted.stride()
    y = nm_act.sparse_gemm(nm_act.compress_packed(x, pattern), lifted)
    exact = reference.sparse_linear(x, weight, None, pattern)
    torch_error = relative_error(nm_act.prune(x, pattern) @ weight.t(), exact)
    assert relative_error(y, exact) <= 2 * torch_error


@HOPPER
@pytest.mark.parametrize("text", LIFTED)
def test_lifted_gemm_in_fp8(text):
    pattern, x = NMPattern(text), torch.randn(300, 1024, device="cuda").bfloat16()
    weight, scale = quantise_rows(torch.randn(256, 1024, device="cuda"))
    packed = nm_act.compress_packed(x, pattern, activation_dtype=E4M3)
    y = nm_act.sparse_gemm(packed, nm_act.lift_weight(weight, pattern), column_scale=scale)
    values, row_scale = quantise_rows(reference.prune(x, pattern))
    exact = (values.double() * row_scale.double()[:, None]) @ (weight.double() * scale.double()[:, None]).t()
    assert relative_error(y, exact) < 6e-3


@pytest.mark.parametrize("text", ["2:4+1", "2:4+1@2"])
@pytest.mark.parametrize("tokens", [3, 1100])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_sparse_linear_with_a_lifted_weight(text, tokens, layout):
    pattern, x = NMPattern(text), torch.randn(tokens, 512, device="cuda").bfloat16()
    weight = stored(torch.randn(256, 512, device="cuda").bfloat16(), layout)
    lifted, bias = nm_act.lift_weight(weight, pattern), torch.randn(256, device="cuda").bfloat16()
    path = nm_act.explain(x, weight, pattern, lifted_weight=lifted).path
    decode = tokens == 3 and layout == "in_out"
    assert path == ("gather" if decode else "lifted" if tokens > 1024 else "dense")
    for options in linear_options(512, 256).values():
        y = nm_act.sparse_linear(x, weight, bias, pattern, lifted_weight=lifted, **options)
        exact = reference.sparse_linear(x, weight, bias, pattern, **options)
        fallback = nm_act.sparse_linear(x, weight, bias, pattern, **options)
        assert relative_error(y, exact) <= 2 * max(relative_error(fallback, exact), 2e-3)


def test_the_weight_may_be_a_view_of_the_lifted_one():
    x = torch.randn(1100, 512, device="cuda").bfloat16()
    for layout in ("out_in", "in_out"):
        lifted = nm_act.lift_weight(stored(torch.randn(256, 512, device="cuda").bfloat16(), layout), "2:4+1")
        weight = lifted[:, :512]
        for rows in (x, x[:2]):
            y = nm_act.sparse_linear(rows, weight, pattern="2:4+1", lifted_weight=lifted)
            assert relative_error(y, reference.sparse_linear(rows, weight, pattern="2:4+1")) < 5e-3


def test_graph_replay():
    x = torch.randn(1100, 512, device="cuda").bfloat16()
    lifted = nm_act.lift_weight(torch.randn(256, 512, device="cuda").bfloat16(), "2:4+1")
    call = lambda: nm_act.sparse_linear(x, lifted[:, :512], pattern="2:4+1", lifted_weight=lifted)  # noqa: E731
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


# ---- the smallest cases for compute-sanitizer ------------------------------------------------------------------------
@pytest.mark.sanitizer
@pytest.mark.parametrize("text", LIFTED)
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_small_operands(text, activation_dtype):
    if activation_dtype and not IS_HOPPER:
        pytest.skip("e4m3 sparse GEMMs need sm_90")
    pattern, x = NMPattern(text), torch.randn(33, 384, device="cuda").bfloat16()
    pruned = nm_act.prune(x, pattern)
    assert_same_bits(pruned.cpu(), reference.prune(x.cpu(), pattern))
    packed = nm_act.compress_packed(x, pattern, activation_dtype=activation_dtype)
    weight = torch.randn(48, 384, device="cuda").to(packed.values.dtype)
    y = nm_act.sparse_gemm(packed, nm_act.lift_weight(weight, pattern))
    exact = pruned.double() @ weight.double().t()
    assert relative_error(y, exact) < (5e-2 if activation_dtype else 8e-3)
