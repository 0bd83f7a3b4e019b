"""Options of the fused operators that need a tensor: never ignored without it, and no default stands in for one.

Meta tensors reach the checks of a compiled call; test_cuda_fused.py and test_cuda_attention.py have those of the kernels.
"""

import pytest
import torch

import nm_act
from nm_act.ops import fused


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


X, WEIGHT, NORM = meta(1, 64), meta(64, 32).t(), meta(64)
HEADS = (meta(1, 1, 2, 64), meta(1, 1, 2, 64))
ANGLES = (meta(1, 1, 64), meta(1, 1, 64))
CACHED = (*HEADS, HEADS[1], *ANGLES, meta(1, 2, 8, 64), meta(1, 2, 8, 64), meta(1, dtype=torch.int32))
WITH_HEADS = {
    "rotary": lambda **norms: fused.rotary(*HEADS, *ANGLES, **norms),
    "rotary_cache": lambda **norms: fused.rotary_cache(*CACHED, **norms),
    "decode_attention": lambda **norms: fused.decode_attention(*CACHED, scaling=1.0, **norms),
}


@pytest.mark.parametrize(
    ("around", "sentence"),
    [
        ({"norm_weight": NORM}, "expected eps along with norm_weight, got none; give the epsilon of the norm"),
        ({"eps": 1e-5}, "expected norm_weight along with eps, got none; leave the option out or give the weight"),
        ({"unit_offset": True}, "expected norm_weight along with unit_offset, got none"),
        ({"up": X, "activation": "silu", "unit_offset": True}, "expected norm_weight along with unit_offset, got none"),
        ({"activation": "gelu_tanh"}, "expected up and activation together, got activation alone; give both or neither"),
        ({"up": X}, "expected up and activation together, got up alone; give both or neither"),
    ],
)  # fmt: skip
def test_decode_linear_ignores_no_option(around, sentence):
    with pytest.raises(ValueError, match=f"nm_act::decode_linear {sentence}"):
        fused.decode_linear(X, WEIGHT, None, "2:4", **around)


@pytest.mark.parametrize("op", WITH_HEADS)
@pytest.mark.parametrize(
    ("norms", "sentence"),
    [
        ({"q_norm": NORM, "k_norm": NORM}, "expected eps along with q_norm or k_norm, got none"),
        ({"k_norm": NORM, "unit_offset": True}, "expected eps along with q_norm or k_norm, got none"),
        ({"eps": 1e-6}, "expected q_norm or k_norm along with eps, got none"),
        ({"unit_offset": True}, "expected q_norm or k_norm along with unit_offset, got none"),
    ],
)
def test_norms_of_heads_ignore_no_option(op, norms, sentence):
    with pytest.raises(ValueError, match=f"nm_act::{op} {sentence}"):
        WITH_HEADS[op](**norms)


def test_options_with_their_tensors_are_taken():
    for around in ({}, {"norm_weight": NORM, "eps": 0.0, "unit_offset": True}, {"up": X, "activation": "silu"}):
        assert fused.decode_linear(X, WEIGHT, None, "2:4", **around).shape == (1, 32)
    for op in WITH_HEADS.values():
        for norms in ({}, {"q_norm": NORM, "eps": 1e-6}, {"k_norm": NORM, "eps": 1e-6, "unit_offset": True}):
            op(**norms)


def test_a_shifted_operand_needs_the_row_sums_of_the_weight():
    x = torch.randn(4, 64)
    values, metadata = nm_act.compress(x)
    empty, pattern = torch.empty(0), nm_act.NMPattern("2:4")
    operand = nm_act.Packed(values, metadata, empty, torch.ones(4), pattern, 64, "neutral", 4)
    with pytest.raises(ValueError, match="expected shift_out for an operand with a per-token shift, got none"):
        nm_act.sparse_gemm(operand, torch.randn(32, 64))
