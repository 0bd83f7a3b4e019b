"""compress and decompress: bit-exact against the oracle and inverse to each other."""

import re

import pytest
import torch
from conftest import DTYPES, assert_same_bits, hard_activations

import nm_act
from nm_act import reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [4, 8, 12, 32, 68, 4096])
@pytest.mark.parametrize("options", [{}, {"token_shift": "median"}, {"channel_scale": True}])
def test_equals_oracle(dtype, in_features, options):
    x = hard_activations(7, in_features, dtype)
    if "channel_scale" in options:
        options = {"channel_scale": torch.rand(in_features)}
    values, metadata = nm_act.compress(x, **options)
    expected_values, expected_metadata = reference.compress(x, **options)
    assert_same_bits(values, expected_values, any_nan=True)  # torch's gather may change a NaN's payload
    assert torch.equal(metadata, expected_metadata)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (33, 12), (2, 3, 64), (129, 256), (0, 16)])
def test_decompress_gives_the_pruned_tensor(dtype, shape):
    x = torch.randn(shape).to(dtype)
    assert_same_bits(nm_act.decompress(*nm_act.compress(x)), nm_act.prune(x, "2:4"))


def test_every_nibble_is_legal_and_ascending():
    _, metadata = nm_act.compress(hard_activations(7, 64, torch.float32))
    nibbles = torch.stack([metadata & 15, metadata >> 4])
    assert ((nibbles & 3) < (nibbles >> 2)).all()


def test_known_bytes():
    # Survivors 1, 2 (nibble 0b1001) then 0, 3 (nibble 0b1100): the lower group in the low nibble.
    values, metadata = nm_act.compress(torch.tensor([[0.0, 5, -6, 1, 9, 0, 0, -9]]))
    assert values.tolist() == [[5, -6, 9, -9]]
    assert metadata.tolist() == [[0b1100_1001]]


V, M = nm_act.compress(torch.randn(2, 32))


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (ValueError, "expected in_features divisible by m, got in_features 6", lambda: nm_act.compress(torch.zeros(1, 6))),
        (TypeError, "compress expected x in float32", lambda: nm_act.compress(torch.zeros(1, 8).long())),
        (ValueError, "in_features divisible by 4, got [2, 15]", lambda: nm_act.decompress(V[:, :15], M)),
        (TypeError, "expected metadata in uint8, got torch.int32", lambda: nm_act.decompress(V, M.int())),
        (ValueError, "expected metadata of shape [2, 4]", lambda: nm_act.decompress(V, M[:, :3])),
        (ValueError, "nibbles name two ascending indices", lambda: nm_act.decompress(V, torch.zeros_like(M))),
    ],
)  # fmt: skip
def test_error_sentences(error, sentence, call):
    with pytest.raises(error, match=re.escape(sentence)):
        call()
