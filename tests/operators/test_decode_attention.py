"""The oracle of decode attention: against torch's attention, and lengths out of range beside valid ones."""

import pytest
import torch
import torch.nn.functional as F

from nm_act import reference

Q_HEADS, K_HEADS, DIM, CACHE = 6, 2, 64, 8


def drawn(lengths, one_angle=False):
    """The arguments of a decode step for sequences of these lengths."""
    batch = len(lengths)
    q, k, v = (torch.randn(batch, 1, heads, DIM) for heads in (Q_HEADS, K_HEADS, K_HEADS))
    angles = 3 * torch.randn(1 if one_angle else batch, 1, DIM)
    caches = [torch.randn(batch, K_HEADS, CACHE, DIM) for _ in range(2)]
    return [q, k, v, angles.cos(), angles.sin(), *caches, torch.tensor(lengths, dtype=torch.int32)]


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("one_angle", [False, True])
def test_the_oracle_is_torchs_attention_over_the_last_tokens(window, one_angle):
    q, k, v, cos, sin, keys, values, lengths = arguments = drawn([1, 5, CACHE], one_angle)
    for cache in (keys, values):
        for sequence, length in enumerate(lengths.tolist()):
            cache[sequence, :, length - 1 :] = torch.nan  # neither read nor, beyond the new token, written
    before = [cache.clone() for cache in (keys, values)]
    y = reference.decode_attention(*arguments, scaling=0.1, window=window)
    turn = torch.cat((-torch.eye(DIM)[DIM // 2 :], torch.eye(DIM)[: DIM // 2]))  # rotate_half, as a matrix
    for sequence, length in enumerate(lengths.tolist()):
        by = [angle[0 if one_angle else sequence] for angle in (cos, sin)]
        query, new = (x[sequence, 0] * by[0] + x[sequence, 0] @ turn.t() * by[1] for x in (q, k))
        for cache, old, last in ((keys, before[0], new), (values, before[1], v[sequence, 0])):
            torch.testing.assert_close(cache[sequence, :, length - 1], last)
            old[sequence, :, length - 1] = cache[sequence, :, length - 1]
        first = max(0, length - window) if window else 0
        read = [cache[None, sequence, :, first:length].double() for cache in (keys, values)]
        exact = F.scaled_dot_product_attention(query[None, :, None].double(), *read, scale=0.1, enable_gqa=True)
        torch.testing.assert_close(y[sequence, 0], exact[0, :, 0], atol=1e-6, rtol=1e-6)
    for cache, old in zip((keys, values), before, strict=True):
        torch.testing.assert_close(cache, old, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("wrong", [0, CACHE + 1, 1000, -1])
def test_a_length_out_of_range_writes_nothing_gives_nan_and_leaves_the_others_alone(wrong):
    arguments = drawn([3, wrong, CACHE])
    before = [cache.clone() for cache in arguments[5:7]]
    others = [tensor[[0, 2]] for tensor in arguments]
    y = reference.decode_attention(*arguments, scaling=0.1)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2]], reference.decode_attention(*others, scaling=0.1))
    for after, old, alone in zip(arguments[5:7], before, others[5:7], strict=True):
        assert torch.equal(after[1], old[1])
        assert torch.equal(after[[0, 2]], alone)
        assert not torch.equal(after[0], old[0])
