"""Weights in e4m3: storage, and the operator that chooses one of their copies."""

import pytest
import torch
from linear_cases import relative_error

from nm_act import NMPattern, reference
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


def test_which_copy_a_call_reads():
    one = torch.empty(0)
    assert [reads_rows(tokens, one, one) for tokens in (1, 4, 5)] == [True, True, False]
    assert reads_rows(600, None, one)
    assert not reads_rows(1, one, None)


def test_what_is_refused():
    with pytest.raises(ValueError, match="expected fp8 among prefill, decode, both, got 'e5m2'; choose one of those"):
        check_layout("e5m2")
    stored = E4M3Weight.quantised(WEIGHT, "both")
    with pytest.raises(NotImplementedError, match="expected CUDA tensors along with activation_dtype float8_e4m3fn"):
        stored.linear(torch.randn(5, 64), None, None, NMPattern("8:16"))
