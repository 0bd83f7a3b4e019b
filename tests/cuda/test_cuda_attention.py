"""Rotary embedding, with norms of heads and the cache, and attention of a decode step in one kernel, against the oracle."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import GPU_MARKS, HALVES, HOPPER, IS_HOPPER, drawn, poison, rms_norm
from linear_cases import relative_error

from nm_act import reference
from nm_act.ops import fused

pytestmark = GPU_MARKS


def heads_of(batch, tokens, q_heads, k_heads, dim, dtype):
    """q, k and v as parts of one merged projection."""
    merged = drawn(batch, tokens, (q_heads + 2 * k_heads) * dim, dtype=dtype)
    sizes = [count * dim for count in (q_heads, k_heads, k_heads)]
    return [part.unflatten(-1, (-1, dim)) for part in merged.split(sizes, dim=-1)]


def angles_of(rows, tokens, dim, dtype):
    """Cosines and sines."""
    angles = 3 * drawn(rows, tokens, dim, dtype=torch.float32, seed=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("q_heads", "k_heads", "dim"), [(32, 8, 128), (3, 1, 64), (7, 2, 80), (8, 4, 256)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (2, 37), (1, 600)])
def test_rotary(dtype, q_heads, k_heads, dim, batch, tokens):
    q, k, v = heads_of(batch, tokens, q_heads, k_heads, dim, dtype)
    for rows in {1, batch}:
        cos, sin = angles_of(rows, tokens, dim, dtype)
        poison()
        q_out, k_out = fused.rotary(q, k, cos, sin)
        assert torch.equal(q_out, reference._rotated(q, cos, sin))
        assert torch.equal(k_out, reference._rotated(k, cos, sin))
        before = 5
        keys, values = (
            torch.full((batch, k_heads, tokens + 9, dim), 7.0, device="cuda", dtype=dtype) for _ in range(2)
        )
        lengths = torch.full((batch,), before + tokens, dtype=torch.int32, device="cuda")
        again = fused.rotary_cache(q, k, v, cos, sin, keys, values, lengths)
        assert torch.equal(again, q_out)
        for cache, new in ((keys, k_out), (values, v)):
            assert torch.equal(cache[:, :, before : before + tokens], new.transpose(1, 2))
            assert (cache[:, :, :before] == 7).all()
            assert (cache[:, :, before + tokens :] == 7).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(
    ("q_heads", "k_heads", "dim"), [(32, 8, 128), (3, 1, 64), (8, 4, 256), (5, 5, 16), (2, 1, 512)]
)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 37)])
def test_norms_of_heads_before_the_embedding(dtype, unit_offset, q_heads, k_heads, dim, batch, tokens):
    q, k, v = heads_of(batch, tokens, q_heads, k_heads, dim, dtype)
    cos, sin = angles_of(1, tokens, dim, dtype)
    weights = [drawn(dim, dtype=dtype, seed=seed) for seed in (2, 3)]
    norms = {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-6, "unit_offset": unit_offset}
    normed = [rms_norm(x, weight, 1e-6, unit_offset) for x, weight in zip((q, k), weights, strict=True)]
    poison()
    actual, expected = fused.rotary(q, k, cos, sin, **norms), fused.rotary(*normed, cos, sin)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 2e-3
    only = fused.rotary(q, k, cos, sin, k_norm=weights[1], eps=1e-6, unit_offset=unit_offset)
    assert torch.equal(only[0], reference._rotated(q, cos, sin))
    assert torch.equal(only[1], actual[1])
    keys, values = (torch.zeros(batch, k_heads, tokens + 3, dim, device="cuda", dtype=dtype) for _ in range(2))
    lengths = torch.full((batch,), tokens + 1, dtype=torch.int32, device="cuda")
    assert torch.equal(fused.rotary_cache(q, k, v, cos, sin, keys, values, lengths, **norms), actual[0])
    assert torch.equal(keys[:, :, 1 : tokens + 1], actual[1].transpose(1, 2))
    assert torch.equal(values[:, :, 1 : tokens + 1], v.transpose(1, 2))
    if tokens == 1 and dim in (64, 128, 256) and IS_HOPPER:
        cached = [cache.clone() for cache in (keys, values)]
        y = fused.decode_attention(q, k, v, cos, sin, *cached, lengths, scaling=dim**-0.5, **norms)
        assert torch.equal(cached[0], keys)
        apart = [normed[0], normed[1], v, cos, sin, *(cache.clone() for cache in (keys, values)), lengths]
        assert relative_error(y, fused.decode_attention(*apart, scaling=dim**-0.5)) < 1e-2


OUT_OF_RANGE = [0, 9, 1000, -1, 2**31 - 1, -(2**31)]  # of a cache of 8 tokens


@pytest.mark.parametrize(("q_heads", "k_heads", "dim"), [(32, 8, 128), (3, 1, 64), (8, 4, 256)])
@pytest.mark.parametrize("repeats", [1, 7])  # clusters of several blocks, and of one
def test_lengths_out_of_range_write_nothing_and_leave_the_others_alone(q_heads, k_heads, dim, repeats):
    given = [8, *OUT_OF_RANGE, 1, 5] * repeats
    lengths = torch.tensor(given, dtype=torch.int32, device="cuda")
    valid = (lengths >= 1) & (lengths <= 8)
    q, k, v = (drawn(len(given), 1, heads, dim, seed=seed) for seed, heads in enumerate((q_heads, k_heads, k_heads)))
    angles = drawn(1, 1, dim, dtype=torch.float32, seed=3)
    step = (q, k, v, angles.cos().bfloat16(), angles.sin().bfloat16())
    # Caches in the middle of larger memory, where a write outside would show.
    whole = drawn(2, len(given) + 2, k_heads, 8, dim, seed=4)
    expected, all_valid = whole.clone(), whole.clone()
    exact = reference.decode_attention(*step, *expected[:, 1:-1], lengths, scaling=dim**-0.5)
    written = whole.clone()
    fused.rotary_cache(*step, *written[:, 1:-1], lengths)
    assert torch.equal(written, expected)
    if not IS_HOPPER:
        return
    poison()
    y = fused.decode_attention(*step, *whole[:, 1:-1], lengths, scaling=dim**-0.5)
    assert torch.equal(whole, expected)
    assert y[~valid].isnan().all()
    assert relative_error(y[valid], exact[valid]) < 3e-3
    same = lengths.where(valid, 4)
    others = fused.decode_attention(*step, *all_valid[:, 1:-1], same, scaling=dim**-0.5)
    assert torch.equal(y[valid], others[valid])


def test_lengths_out_of_range_in_a_prompt():
    """Tokens of a prompt are written where their place is in the cache, each for itself."""
    q, k, v = (drawn(3, 5, 2, 64, seed=seed) for seed in range(3))
    angles = drawn(1, 5, 64, dtype=torch.float32, seed=3)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    caches = torch.full((2, 3, 2, 8, 64), 7.0, device="cuda", dtype=torch.bfloat16)
    fused.rotary_cache(q, k, v, cos, sin, *caches, torch.tensor([3, 10, -(2**31)], dtype=torch.int32, device="cuda"))
    for cache, new in zip(caches, (reference._rotated(k, cos, sin), v), strict=True):
        new = new.transpose(1, 2)
        assert torch.equal(cache[0, :, :3], new[0, :, 2:])
        assert torch.equal(cache[1, :, 5:], new[1, :, :3])
        assert (cache[0, :, 3:] == 7).all()
        assert (cache[1, :, :5] == 7).all()
        assert (cache[2] == 7).all()


def test_no_heads_and_no_sequences():
    cos = sin = drawn(1, 1, 64)
    nothing = drawn(1, 1, 0, 64)
    assert [x.shape for x in fused.rotary(nothing, nothing, cos, sin)] == [(1, 1, 0, 64)] * 2
    none = drawn(0, 1, 2, 64)
    cached = (drawn(0, 2, 8, 64), drawn(0, 2, 8, 64), torch.zeros(0, dtype=torch.int32, device="cuda"))
    assert fused.rotary_cache(none, none, none, cos, sin, *cached).shape == none.shape
    if IS_HOPPER:
        assert fused.decode_attention(none, none, none, cos, sin, *cached, scaling=1.0).shape == none.shape


@HOPPER
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("q_heads", "k_heads", "dim"),
    [(32, 8, 128), (28, 4, 128), (3, 1, 64), (9, 3, 64), (8, 4, 256), (8, 8, 128), (8, 1, 256), (40, 8, 128)],
)
@pytest.mark.parametrize("batch", [1, 3, 8, 40])
def test_attention_of_a_decode_step(dtype, q_heads, k_heads, dim, batch):
    most = 700
    generator = torch.Generator().manual_seed(batch)
    q, k, v = heads_of(batch, 1, q_heads, k_heads, dim, dtype)
    cos, sin = angles_of(batch, 1, dim, dtype)
    keys, values = (drawn(batch, k_heads, most, dim, dtype=dtype, seed=seed) for seed in (2, 3))
    for low, high, window in ((1, 2, 0), (1, most + 1, 0), (most, most + 1, 0), (1, most + 1, 100), (2, 300, 1)):
        lengths = torch.randint(low, high, (batch,), generator=generator, dtype=torch.int32).cuda()
        cached = [cache.clone() for cache in (keys, values)]
        for sequence, length in enumerate(lengths.tolist()):  # nothing beyond may be read
            for cache in cached:
                cache[sequence, :, length - 1 :] = torch.nan
        expected = [cache.clone() for cache in cached]
        query = fused.rotary_cache(q, k, v, cos, sin, *expected, lengths).transpose(1, 2)
        poison()
        y = fused.decode_attention(q, k, v, cos, sin, *cached, lengths, scaling=dim**-0.5, window=window)
        for actual, wanted in zip(cached, expected, strict=True):
            assert torch.equal(actual.nan_to_num(99), wanted.nan_to_num(99))
        place, length = torch.arange(most, device="cuda"), lengths[:, None]
        seen = (place < length) & (place >= (length - window if window else 0))
        wide = [cache.nan_to_num(0).float().repeat_interleave(q_heads // k_heads, dim=1) for cache in expected]
        exact = F.scaled_dot_product_attention(query.float(), *wide, attn_mask=seen[:, None, None])
        # The kernel rounds probabilities, as flash attention does.
        near = 3e-3 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(y.float(), exact.transpose(1, 2), atol=near, rtol=1e-2)
        assert relative_error(y, exact.transpose(1, 2)) < near


def test_wrong_arguments_are_one_sentence():
    wide, norm = drawn(1, 1, 2, 80), drawn(64)
    heads = (drawn(1, 1, 2, 64), drawn(1, 1, 2, 64), drawn(1, 1, 64), drawn(1, 1, 64))
    narrow = (drawn(1, 1, 2, 24), drawn(1, 1, 2, 24), drawn(1, 1, 24), drawn(1, 1, 24))
    cache = (heads[1], *(torch.zeros(1, 2, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)))
    cached = (*heads[:2], cache[0], *heads[2:], *cache[1:], torch.ones(1, dtype=torch.int32, device="cuda"))
    wrong = [
        ("expected head_dim 16, 32, 64, 128, 256 or 512 with q_norm, got 80", lambda: fused.rotary(wide, wide, wide[:, :, 0], wide[:, :, 0], q_norm=drawn(80), eps=1e-6)),
        (r"expected k_norm of shape \[64\], got \[32\]", lambda: fused.rotary(*heads, k_norm=drawn(32), eps=1e-6)),
        ("head_dim divisible by 16", lambda: fused.rotary(*narrow)),
    ]  # fmt: skip
    attention = partial(fused.decode_attention, scaling=1.0)
    for op, arguments in ((fused.rotary, heads), (fused.rotary_cache, cached), (attention, cached)):
        call = partial(op, *arguments)
        wrong += [
            ("expected eps along with q_norm or k_norm, got none", partial(call, k_norm=norm)),
            ("expected q_norm or k_norm along with eps, got none", partial(call, eps=1e-6)),
            ("expected q_norm or k_norm along with unit_offset, got none", partial(call, unit_offset=True)),
        ]
    for sentence, call in wrong:
        with pytest.raises(ValueError, match=sentence):
            call()
