"""Weights in e4m3: storage, and the operator that chooses one of their copies."""

import re
from types import SimpleNamespace

import pytest
import torch
from linear_cases import relative_error

from nm_act import NMPattern, reference
from nm_act.ops import explain
from nm_act.ops.e4m3 import E4M3, E4M3Weight, check_layout, reads_rows

WEIGHT = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


def test_copies_hold_the_same_values_once_or_twice():
    stored = {layout: E4M3Weight.quantised(WEIGHT, layout) for layout in ("prefill", "decode", "both")}
    assert [(each.codes is None, each.rows is None) for each in stored.values()] == [
        (False, True),
        (True, False),
        (False, False),
    ]
    for each in stored.values():
        assert torch.equal(each.values.float(), stored["both"].values.float())
        assert sum(tensor.nbytes for tensor in each.tensors()) == (1 + (each is stored["both"])) * 48 * 64 + 4 * 48
        assert relative_error(each.dequantised(torch.float32), WEIGHT) < 0.04  # three bits of mantissa
    assert stored["decode"].values.dtype == E4M3
    assert stored["decode"].values.t().is_contiguous()


def test_many_rows_are_quantised_in_slices():
    weight = torch.randn(5000, 32)
    scale = weight.abs().amax(dim=1) / 448
    assert torch.equal(E4M3Weight.quantised(weight, "decode").scale, scale)


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "2:4+1"])
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_the_operator_multiplies_the_stored_values(pattern, tokens):
    stored, x, bias = E4M3Weight.quantised(WEIGHT, "decode"), torch.randn(tokens, 64), torch.randn(48)
    options = {"channel_scale": torch.rand(64), "token_shift": "mean", "variance_correction": True}
    y = stored.linear(x, None, bias, NMPattern(pattern), **options)
    exact = reference.sparse_linear(x, stored.dequantised(torch.float32), bias, pattern, **options)
    assert relative_error(y, exact) < 1e-5


@pytest.mark.parametrize("name", ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
def test_opcheck(name):
    stored, x = E4M3Weight.quantised(WEIGHT, "decode"), torch.randn(3, 64)
    arguments = (x, None, stored.rows, stored.scale, None, 8, 16)
    torch.library.opcheck(torch.ops.nm_act.e4m3_linear, arguments, test_utils=name)


@pytest.fixture
def hopper(monkeypatch):
    facts = SimpleNamespace(major=9, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: facts)
    monkeypatch.setattr(explain, "_GATHERS", {})
    return torch.device("cuda", 0)


@pytest.mark.parametrize(("pattern", "most"), [("2:4", 2), ("1:8", 4), ("7:32", 3), ("1:4", 2), ("31:32", 2)])
def test_which_copy_a_call_reads(pattern, most, hopper):
    """With both, that of the gather kernel where the dispatch takes it, which else would dequantise, and rows are left."""
    codes = E4M3Weight.quantised(WEIGHT, "both").codes
    shifted = torch.zeros(48 * 64 + 1, dtype=torch.uint8)[1:].view(64, 48)  # off the alignment of a vector load
    few, pattern = (1, 2, 3, 4), NMPattern(pattern)
    for rows, dtype, declines in (
        (codes.t().contiguous(), torch.bfloat16, False),
        (codes.t().contiguous(), torch.float16, False),
        (codes[:40].t().contiguous(), torch.bfloat16, True),  # 40 outputs are no whole vectors of 16
        (shifted, torch.bfloat16, True),
        (codes.t(), torch.bfloat16, True),  # stored [out, in]
    ):
        for tokens in few:
            taken = reads_rows(tokens, dtype, hopper, pattern, codes, rows)
            assert taken == (not declines and tokens <= most), (tokens, dtype, rows.shape)
            x = torch.empty(tokens, 64, dtype=dtype)
            if rows is not shifted:  # explain() would look at its own alignment
                path = explain.explain(x, rows.view(E4M3).t(), pattern, device="cuda").path
                assert taken == (path == "gather" and tokens <= most)
        assert not reads_rows(5, dtype, hopper, pattern, codes, rows)
    rows = codes.t().contiguous()
    for device, dtype in ((hopper, torch.float32), (torch.device("cpu"), torch.bfloat16)):  # neither kernel
        assert [reads_rows(tokens, dtype, device, pattern, codes, rows) for tokens in (1, 4, 5)] == [True, True, False]
    assert reads_rows(600, torch.bfloat16, hopper, pattern, None, rows)
    assert not reads_rows(1, torch.bfloat16, hopper, pattern, codes, None)


BOTH = E4M3Weight.quantised(WEIGHT, "both")
ARGUMENTS = {
    "x": torch.randn(3, 64),
    "codes": None,
    "rows": BOTH.rows,
    "weight_scale": BOTH.scale,
    "bias": torch.randn(48),
    "n": 8,
    "m": 16,
}
WRONG = [
    (ValueError, "expected codes [out, in], rows [in, out] or both, got neither", {"rows": None}),
    (TypeError, "expected rows as the bytes of e4m3 values, uint8, got torch.int8", {"rows": BOTH.rows.view(torch.int8)}),
    (TypeError, "expected codes as the bytes of e4m3 values, uint8, got torch.float8_e4m3fn", {"codes": BOTH.values}),
    (ValueError, "expected rows of shape [in, out], got [3072]; reshape it", {"rows": BOTH.rows.flatten()}),
    (ValueError, "expected rows of shape [64, 48] beside codes [48, 64], got [48, 64]", {"codes": BOTH.codes, "rows": BOTH.codes}),
    (TypeError, "expected x in float32, bfloat16 or float16, got torch.float64", {"x": torch.randn(3, 64).double()}),
    (ValueError, "expected x of shape [..., 64] for a weight of 64 inputs, got [3, 48]", {"x": torch.randn(3, 48)}),
    (ValueError, "expected x of shape [..., 64] for a weight of 64 inputs, got []", {"x": torch.tensor(1.0)}),
    (TypeError, "expected weight_scale in float32, got torch.float16", {"weight_scale": BOTH.scale.half()}),
    (ValueError, "expected weight_scale of shape [48], got [64]", {"weight_scale": torch.ones(64)}),
    (ValueError, "expected weight_scale of shape [48], got []", {"weight_scale": torch.tensor(1.0)}),
    (TypeError, "expected bias in float32, got torch.float16", {"bias": torch.ones(48).half()}),
    (ValueError, "expected bias of shape [48], got [1]", {"bias": torch.ones(1)}),
    (ValueError, "expected channel_scale of shape [64], got [48]", {"channel_scale": torch.ones(48)}),
    (TypeError, "expected channel_scale in float32, got torch.int64", {"channel_scale": torch.ones(64, dtype=torch.long)}),
    (ValueError, "expected shift_out of shape [48], got [64]", {"shift_out": torch.ones(64), "token_shift": "mean"}),
    (ValueError, "expected token_shift along with shift_out, got shift_out alone", {"shift_out": torch.ones(48)}),
    (ValueError, 'expected token_shift "none", "mean" or "median", got \'max\'', {"token_shift": "max"}),
    (ValueError, "expected 1 <= N < M, got pattern 16:16", {"n": 16}),
    (ValueError, "expected a group size M in {2, 4, 8, 16, 32}, got pattern 8:64", {"m": 64}),
    (ValueError, "expected extra windows with 2:4 only, got 8:16+1", {"extra_columns": [0]}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "sentence", "changed"), WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_arguments_are_one_sentence(device, error, sentence, changed):
    """The same from the kernel, which both devices share, and from what a compiler calls in its place."""
    arguments = ARGUMENTS | changed
    if device == "meta":
        arguments = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error, match=re.escape(sentence)):
        torch.ops.nm_act.e4m3_linear(**arguments)


def test_tensors_on_several_devices_are_one_sentence():
    for name in ("weight_scale", "bias", "rows"):
        with pytest.raises(ValueError, match=f"expected {name} on the device of x, cpu, got meta; move it there"):
            torch.ops.nm_act.e4m3_linear(**ARGUMENTS | {name: ARGUMENTS[name].to("meta")})


def test_groups_divide_the_inputs():
    rows = torch.zeros(40, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected in_features divisible by 16 for 8:16, got 40; choose another"):
        torch.ops.nm_act.e4m3_linear(torch.randn(1, 40), None, rows, BOTH.scale, None, 8, 16)


def test_what_is_refused():
    with pytest.raises(ValueError, match="expected fp8 among prefill, decode, both, got 'e5m2'; choose one of those"):
        check_layout("e5m2")
    stored = E4M3Weight.quantised(WEIGHT, "both")
    with pytest.raises(NotImplementedError, match="expected CUDA tensors along with activation_dtype float8_e4m3fn"):
        stored.linear(torch.randn(5, 64), None, None, NMPattern("8:16"))
