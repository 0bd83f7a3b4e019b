"""The packed operand as a type, and e4m3 activations, as far as they need no device: what is checked, and every sentence."""

import dataclasses
import re

import pytest
import torch

import nm_act
from nm_act import NMPattern
from nm_act.ops import packed as packed_module

E4M3 = torch.float8_e4m3fn


def operand(tokens: int = 6, in_features: int = 64, pattern: str = "2:4", **changed) -> nm_act.Packed:
    features = nm_act.ops.lifting.lifted_features(pattern, in_features)
    empty = torch.empty(0)
    values, metadata = torch.zeros(tokens, features // 2).bfloat16(), torch.zeros(64 * features // 8, dtype=torch.uint8)
    made = nm_act.Packed(values, metadata, empty, empty, NMPattern(pattern), in_features, "sm90_16bit_t64", tokens)
    return dataclasses.replace(made, **changed)


def test_iterating_gives_the_tensors():
    made = operand()
    values, metadata, row_scale, eta = made
    assert values is made.values
    assert metadata is made.metadata
    assert (row_scale.numel(), eta.numel()) == (0, 0)
    hidden = torch.zeros(6, 64)
    assert [*operand(hidden=hidden)][4] is hidden
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.tokens = 3


def test_printing_names_what_it_holds_without_its_numbers():
    pattern = NMPattern("2:4")
    assert repr(operand()) == f"Packed(pattern={pattern!r}, in_features=64, layout='sm90_16bit_t64', tokens=6)"


WEIGHT = torch.zeros(8, 64).bfloat16()
WHOLE = "expected an operand with contiguous values [6, 32] for 6 tokens of 64 features in 2:4, got "
NO_OPERAND = "expected operand as an nm_act.Packed, got Tensor; pass all that compress_packed returned as one"


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (TypeError, NO_OPERAND, lambda made: nm_act.sparse_gemm(made.values, made.metadata, WEIGHT)),
        (TypeError, NO_OPERAND, lambda made: nm_act.sparse_gemm(made.values, made.metadata, WEIGHT, None, row_scale=made.eta)),
        (TypeError, NO_OPERAND, lambda made: nm_act.sparse_gemm_silu_mul(made.values, WEIGHT)),
        (TypeError, "unexpected keyword argument 'row_scale'", lambda made: nm_act.sparse_gemm(made, WEIGHT, row_scale=made.eta)),
        (TypeError, "expected weight as a torch.Tensor, got NoneType; pass the layer's own", lambda made: nm_act.sparse_gemm(made, None)),
        (ValueError, WHOLE + "[4, 32]", lambda made: nm_act.sparse_gemm(dataclasses.replace(made, values=made.values[1:5]), WEIGHT)),
        (ValueError, WHOLE + "[6, 32] with strides (1, 6)", lambda made: nm_act.sparse_gemm(dataclasses.replace(made, values=made.values.t().contiguous().t()), WEIGHT)),
        (ValueError, "expected weight of shape [out_features, 64] for an operand of 64 features in 2:4, got [8, 128]", lambda made: nm_act.sparse_gemm(made, torch.zeros(8, 128))),
        (ValueError, "expected weight of shape [out_features, 80] for an operand of 64 features in 2:4+1@2, got [8, 64]; use nm_act.lift_weight", lambda made: nm_act.sparse_gemm(operand(pattern="2:4+1@2"), WEIGHT)),
        (ValueError, "expected weight of shape [out_features, 64]", lambda made: nm_act.sparse_gemm(made, WEIGHT[0])),
        (NotImplementedError, "nm_act::sparse_gemm expected CUDA tensors, got CPU tensors", lambda made: nm_act.sparse_gemm(made, WEIGHT)),
    ],
)  # fmt: skip
def test_every_consumer_checks_the_operand(error, sentence, call):
    with pytest.raises(error, match=re.escape(sentence)):
        call(operand())


@pytest.mark.parametrize("layout", ["sm80_16bit", "sm90_16bit_t64", "sm90_8bit"])
@pytest.mark.parametrize("pattern", ["2:4", "2:4+1@2"])
@pytest.mark.parametrize("tokens", [0, 3, 70])
def test_to_dense_is_the_selection(layout, pattern, tokens):
    pattern, x = NMPattern(pattern), torch.randn(tokens, 128).bfloat16()
    if layout == "sm90_8bit":
        x = x.to(E4M3).bfloat16()  # as much as e4m3 can hold
    pruned = nm_act.prune(x, pattern)
    lifted = pruned
    if pattern.extra_columns:  # where three of a quad survive, its column e lies in the extra window
        quads, column = pruned.unflatten(-1, (-1, 4)).clone(), pattern.extra_columns[0]
        extra = torch.where((quads != 0).sum(-1) > 2, quads[..., column], 0)
        quads[..., column] -= extra
        lifted = torch.cat([quads.flatten(-2), extra], dim=1)
    values, metadata = nm_act.compress(lifted)
    values = values.to(E4M3) if layout == "sm90_8bit" else values
    metadata = nm_act.pack_metadata(metadata, lifted.shape[1], layout)
    made = nm_act.Packed(values, metadata, X[:0], X[:0], pattern, 128, layout, tokens)
    assert made.to_dense().dtype == values.dtype
    assert torch.equal(made.to_dense().float(), pruned.float())


def test_compressing_and_multiplying_is_one_graph(monkeypatch):
    """As far as it is traced: what would not run on a CPU is left out of the graph's run."""
    monkeypatch.setattr(packed_module, "_layout", lambda dtype, device: "sm90_16bit_t64")
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if str(node.target).startswith("nm_act.")])
        return lambda *_arguments: (torch.zeros(6, 8), torch.zeros(6, 40))

    def block(x, norm, weight):
        normed = nm_act.rms_norm_compress(x, norm, 1e-6, x)
        y = nm_act.sparse_gemm(nm_act.silu_mul_compress(x, normed.hidden), weight)
        y = y + nm_act.sparse_gemm(nm_act.compress_packed(x), weight) + nm_act.sparse_gemm(normed, weight)
        values, *_ = nm_act.compress_packed(x, extra_columns=(1,))
        return y, values

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    shapes = [part.shape for part in compiled(torch.randn(6, 64).bfloat16(), torch.ones(64).bfloat16(), WEIGHT)]
    assert shapes == [(6, 8), (6, 40)]
    assert [len(names) for names in graphs] == [7]


class Called(Exception):
    pass


@pytest.mark.parametrize("name", ["compress_packed", "rms_norm_compress", "silu_mul_compress"])
def test_fp8_of_old_calls_names_the_new_way(monkeypatch, name):
    def call(op, *arguments, **options):
        raise Called(options["activation_dtype"])

    monkeypatch.setattr(packed_module.library, "call", call)
    arguments = {"rms_norm_compress": (NORM, 1e-6), "silu_mul_compress": (X,)}.get(name, ())
    for fp8, dtype in ((True, E4M3), (False, None)):
        with (
            pytest.raises(Called) as called,
            pytest.warns(DeprecationWarning, match=f"nm_act.{name} takes activation_d"),
        ):
            getattr(nm_act, name)(X, *arguments, fp8=fp8)
        assert called.value.args == (dtype,)
    with pytest.raises(
        TypeError, match=f"nm_act.{name} expected activation_dtype alone, got fp8=True beside it; leave it out"
    ):
        getattr(nm_act, name)(X, *arguments, fp8=True, activation_dtype=E4M3)


# ---- e4m3 activations ------------------------------------------------------------------------------------------------
X, NORM, SCALE = torch.zeros(2, 64).bfloat16(), torch.ones(64).bfloat16(), torch.ones(16)
W8 = torch.zeros(16, 64).to(E4M3)


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (TypeError, "expected activation_dtype float8_e4m3fn or the dtype of x, torch.bfloat16, got torch.float16", lambda: nm_act.sparse_linear(X, WEIGHT, activation_dtype=torch.float16)),
        (TypeError, "expected activation_dtype of type torch.dtype, got str; convert it first", lambda: nm_act.sparse_linear(X, WEIGHT, activation_dtype="e4m3")),
        (TypeError, "expected weight in float8_e4m3fn along with activation_dtype float8_e4m3fn, got torch.bfloat16", lambda: nm_act.sparse_linear(X, WEIGHT, activation_dtype=E4M3)),
        (TypeError, "expected weight_scale along with a weight in torch.float8_e4m3fn", lambda: nm_act.sparse_linear(X, W8, activation_dtype=E4M3)),
        (NotImplementedError, "expected CUDA tensors along with activation_dtype float8_e4m3fn, got CPU tensors", lambda: nm_act.sparse_linear(X, W8, weight_scale=SCALE, activation_dtype=E4M3)),
    ],
)  # fmt: skip
def test_error_sentences_of_e4m3_activations(error, sentence, call):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


def test_the_dtype_of_x_changes_nothing():
    x, weight = torch.randn(3, 64), torch.randn(8, 64)
    assert torch.equal(nm_act.sparse_linear(x, weight, activation_dtype=torch.float32), nm_act.sparse_linear(x, weight))


def test_the_old_operator_names_the_new_way():
    sentence = r"use nm_act.sparse_linear\(x, weight, bias, weight_scale=weight_scale, "
    with pytest.warns(DeprecationWarning, match=sentence), pytest.raises(NotImplementedError, match="CUDA"):
        nm_act.sparse_linear_fp8(X, W8, SCALE)
    assert not hasattr(torch.ops.nm_act, "sparse_linear_fp8")


@pytest.mark.parametrize(
    ("tokens", "weight", "options", "path", "why"),
    [
        (1, W8, {}, "sparse", "fp8 tensor cores"),
        (4096, W8, {}, "sparse", "fp8 tensor cores"),
        (4096, W8, {"pattern": "8:16"}, "dense", "run on the dense fp8 tensor cores"),
        (4096, W8[:8], {"pattern": "8:16"}, "dense", "out_features by 16"),
        (4096, W8.t().contiguous().t(), {}, "dense", "stored [out, in]"),
        (4096, W8[:8], {}, "dense", "out_features by 16"),
        (4096, W8, {"compute_capability": 8}, "dense", "compute capability 9.0"),
        (4096, W8, {"activation_dtype": None}, "sparse", "sparse tensor cores"),
    ],
)
def test_explain_e4m3_activations(tokens, weight, options, path, why):
    x = torch.empty(tokens, 64, dtype=torch.bfloat16, device="meta")
    found = nm_act.explain(x, weight, device="cuda", **{"activation_dtype": E4M3, **options})
    assert found.path == path
    assert why in found.why
