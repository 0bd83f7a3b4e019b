"""The physical 2:4 metadata layouts of the tensor cores: round trips, sizes, padding, and the published formulas."""

import re

import pytest
import torch

import nm_act
from nm_act.ops import METADATA_LAYOUTS

PHYSICAL = METADATA_LAYOUTS[1:]
TILES = {"sm80_16bit": (32, 32), "sm90_16bit_t64": (64, 64), "sm90_8bit": (64, 128)}


def random_metadata(tokens: int, in_features: int) -> torch.Tensor:
    return nm_act.compress(torch.randn(tokens, in_features))[1]


def formula_sm90_16bit(tokens: int, token: int, k: int, tile: int) -> int:
    """Offset in logical elements, as CUTLASS 4.2 lays E out for 16-bit operands."""
    nk, padded = tile // 32, -(-tokens // 64) * 64
    m0, m1, m2 = token % 8, token // 8 % 2, token % 64 // 16
    k0, k1, k2 = k % 16, k // 16 % 2, k % tile // 32
    inner = m2 * 512 * nk + k1 * 256 * nk + m0 * 32 * nk + k2 * 32 + m1 * 16 + k0
    return k // tile * padded * tile + token // 64 * 64 * tile + inner


def formula_sm90_8bit(tokens: int, token: int, k: int) -> int:
    padded = -(-tokens // 64) * 64
    return k // 128 * padded * 128 + token * 128 + k % 128


def formula_sm80(tokens: int, token: int, k: int) -> int:
    """Words of 16 elements: rows interleaved 8 by 8 in 32, 2x2 blocks turned from Z to N, column-major pairs of columns."""
    padded = -(-tokens // 32) * 32
    row, column = token // 32 * 32 + token % 8 * 4 + token % 32 // 8, k // 16
    if row % 2 == 0 and column % 2 == 1:
        row, column = row + 1, column - 1
    elif row % 2 == 1 and column % 2 == 0:
        row, column = row - 1, column + 1
    return (column // 2 * padded * 2 + row * 2 + column % 2) * 16 + k % 16


FORMULAS = {
    "sm80_16bit": formula_sm80,
    "sm90_16bit_t64": lambda tokens, token, k: formula_sm90_16bit(tokens, token, k, 64),
    "sm90_8bit": formula_sm90_8bit,
}


@pytest.mark.parametrize("layout", METADATA_LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 8, 33, 64, 129])
@pytest.mark.parametrize("in_features", [4, 32, 36, 96, 128, 576])
def test_round_trip(layout, tokens, in_features):
    metadata = random_metadata(tokens, in_features)
    physical = nm_act.pack_metadata(metadata, in_features, layout)
    assert torch.equal(nm_act.unpack_metadata(physical, tokens, in_features, layout), metadata)
    if layout in TILES:
        tile_tokens, tile_features = TILES[layout]
        padded = -(-tokens // tile_tokens) * tile_tokens * -(-in_features // tile_features) * tile_features
        assert physical.numel() == padded // 8


@pytest.mark.parametrize("layout", PHYSICAL)
@pytest.mark.parametrize(("tokens", "in_features"), [(1, 128), (33, 256), (70, 96), (129, 384)])
def test_nibbles_stand_where_the_formula_says(layout, tokens, in_features):
    metadata = random_metadata(tokens, in_features)
    physical = nm_act.pack_metadata(metadata, in_features, layout)
    for token in range(tokens):
        for k in range(0, in_features, 4):
            offset = FORMULAS[layout](tokens, token, k)
            nibble = physical[offset // 8].item() >> (offset % 8) & 15
            assert nibble == metadata[token, k // 8].item() >> (k % 8) & 15, (token, k)


@pytest.mark.parametrize("layout", PHYSICAL)
def test_padding_is_a_legal_nibble(layout):
    physical = nm_act.pack_metadata(random_metadata(1, 36), 36, layout)
    nibbles = torch.stack([physical & 15, physical >> 4])
    assert ((nibbles & 3) < (nibbles >> 2)).all()


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (ValueError, "expected a metadata layout named neutral", lambda m: nm_act.pack_metadata(m, 32, "sm70")),
        (ValueError, "in_features a multiple of 4, got 2 and 30", lambda m: nm_act.pack_metadata(m, 30, "sm80_16bit")),
        (ValueError, "expected 16 metadata bytes for 2 tokens of 64 features, got 8", lambda m: nm_act.pack_metadata(m, 64, "sm80_16bit")),
        (TypeError, "expected metadata as uint8 on the CPU, got torch.int32", lambda m: nm_act.pack_metadata(m.int(), 32, "neutral")),
        (ValueError, "expected 128 metadata bytes", lambda m: nm_act.unpack_metadata(m, 2, 32, "sm80_16bit")),
    ],
)  # fmt: skip
def test_error_sentences(error, sentence, call):
    with pytest.raises(error, match=re.escape(sentence)):
        call(random_metadata(2, 32))
