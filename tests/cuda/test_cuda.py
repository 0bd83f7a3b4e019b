"""CUDA selection kernels: prune, compress, compress_packed and the fused producers, bit for bit against the oracle."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, PATTERNS, assert_same_bits, hard_activations
from cuda_cases import (
    E4M3,
    GPU_MARKS,
    HALVES,
    assert_legal,
    assert_same_bytes,
    moved,
    on_gpu,
    packed_layout,
    poison,
    quantise_rows,
    strided,
)
from linear_cases import selections

import nm_act
from nm_act import reference

pytestmark = GPU_MARKS
TOKENS = (1, 33, 129)
SELECTIONS = tuple(selections(4))


# ---- prune -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (7, 8), (1, 16), (1, 32)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_prune_equals_oracle(dtype, n, m, tokens):
    for in_features, names in ((32, SELECTIONS), (288, SELECTIONS), (4096, ("plain",))):
        x = hard_activations(tokens, in_features, dtype, seed=tokens)
        for name in names:
            options = selections(in_features)[name]
            pruned = nm_act.prune(x.cuda(), f"{n}:{m}", **on_gpu(options))
            assert_same_bits(pruned.cpu(), reference.prune(x, f"{n}:{m}", **options), any_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (8, 16)])
def test_prune_of_strided_inputs(dtype, n, m):
    x = hard_activations(33, 272, dtype)
    expected = reference.prune(x, f"{n}:{m}")
    for name, view in strided(x.cuda()).items():
        pruned = nm_act.prune(view, f"{n}:{m}")
        assert pruned.is_contiguous(), name
        assert_same_bits(pruned.cpu(), expected, any_nan=True)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (2, 3, 64), (3, 4)])
def test_prune_and_compress_of_any_shape(shape):
    x = torch.randn(shape)
    assert_same_bits(nm_act.prune(x.cuda(), "2:4").cpu(), reference.prune(x, "2:4"))
    values, metadata = nm_act.compress(x.cuda())
    expected_values, expected_metadata = reference.compress(x)
    assert_same_bits(values.cpu(), expected_values)
    assert torch.equal(metadata.cpu(), expected_metadata)


# ---- compress --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("in_features", [4, 12, 36, 1000, 4096])
def test_compress_equals_oracle(dtype, name, tokens, in_features):
    x, options = hard_activations(tokens, in_features, dtype, seed=tokens), selections(in_features)[name]
    values, metadata = nm_act.compress(x.cuda(), **on_gpu(options))
    expected_values, expected_metadata = reference.compress(x, **options)
    assert_same_bits(values.cpu(), expected_values, any_nan=True)
    assert torch.equal(metadata.cpu(), expected_metadata)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_of_strided_inputs(dtype):
    x = hard_activations(33, 272, dtype)
    expected_values, expected_metadata = reference.compress(x)
    for name, view in strided(x.cuda()).items():
        values, metadata = nm_act.compress(view)
        assert_same_bits(values.cpu(), expected_values, any_nan=True)
        assert torch.equal(metadata.cpu(), expected_metadata), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_decompress_gives_the_pruned_tensor(dtype):
    for shape in ((1, 4), (33, 12), (2, 3, 64), (129, 4096)):
        x = torch.randn(shape, device="cuda").to(dtype)
        assert_same_bits(nm_act.decompress(*nm_act.compress(x)), nm_act.prune(x, "2:4"))


# ---- compress_packed -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("tokens", [*TOKENS, 64, 300])
@pytest.mark.parametrize("in_features", [32, 288, 4096])
def test_packed_equals_neutral(dtype, name, tokens, in_features):
    x, options = hard_activations(tokens, in_features, dtype, seed=tokens), selections(in_features)[name]
    values, metadata, row_scale, eta = nm_act.compress_packed(x.cuda(), **on_gpu(options))
    expected_values, expected_metadata = reference.compress(x, **options)
    assert_same_bits(values.cpu(), expected_values, any_nan=True)
    layout = packed_layout(dtype)
    assert torch.equal(nm_act.unpack_metadata(metadata.cpu(), tokens, in_features, layout), expected_metadata)
    assert_legal(metadata)
    assert row_scale.numel() == 0
    if "token_shift" in options:
        expected_eta = reference.token_shift_values(x, options["token_shift"]).squeeze(-1)
        torch.testing.assert_close(eta.cpu(), expected_eta, rtol=0, atol=0, equal_nan=True)
    else:
        assert eta.numel() == 0


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_packed_of_strided_inputs(dtype, activation_dtype):
    x = torch.randn(33, 288, device="cuda").to(dtype)
    expected = nm_act.compress_packed(x, activation_dtype=activation_dtype)
    for name, view in strided(x).items():
        assert_same_bytes(nm_act.compress_packed(view, activation_dtype=activation_dtype), expected, name)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
@pytest.mark.parametrize("name", SELECTIONS)
def test_packed_variance_factor(dtype, activation_dtype, name):
    x = (torch.randn(65, 1024) + 0.25).to(dtype)
    options = {"channel_scale": torch.rand(1024)} if name == "channel scale" else selections(1024)[name]
    row_scale = nm_act.compress_packed(
        x.cuda(), activation_dtype=activation_dtype, variance_correction=True, **on_gpu(options)
    ).row_scale
    pruned = reference.prune(x, "2:4", **options)
    shifted = reference.shifted(x, options.get("shift"), options.get("token_shift", "none"))
    expected = reference.variance_ratio(shifted, pruned).squeeze(-1)
    if activation_dtype:
        expected = expected * quantise_rows(pruned)[1].double()
    torch.testing.assert_close(row_scale.cpu().double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_packed_tokens_without_variance_have_factor_one(activation_dtype):
    x = torch.zeros(3, 128, dtype=torch.bfloat16, device="cuda")
    values, _, row_scale, _ = nm_act.compress_packed(x, activation_dtype=activation_dtype, variance_correction=True)
    assert (values.float() == 0).all()
    assert row_scale.isfinite().all()
    if not activation_dtype:
        assert (row_scale == 1).all()


# ---- e4m3 ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("in_features", [32, 288, 4096, 14336])
def test_fp8_selects_before_it_quantises(dtype, name, tokens, in_features):
    """The selection looks at x as it is; the scale is amax / 448 over the survivors; the cast is torch's."""
    x, options = torch.randn(tokens, in_features).to(dtype), selections(in_features)[name]
    if tokens > 2:
        x[1], x[2] = torch.randint(-2, 3, (in_features,)), 0.0
        x[0] *= 2.0**-10
    values, metadata, row_scale, _ = nm_act.compress_packed(x.cuda(), activation_dtype=E4M3, **on_gpu(options))
    survivors, expected_metadata = reference.compress(x, **options)
    assert values.dtype == E4M3
    assert torch.equal(nm_act.unpack_metadata(metadata.cpu(), tokens, in_features, "sm90_8bit"), expected_metadata)
    assert_legal(metadata)
    expected_values, expected_scale = quantise_rows(survivors)
    torch.testing.assert_close(row_scale.cpu(), expected_scale, rtol=2e-7, atol=0)
    assert torch.equal(values.cpu().view(torch.uint8), expected_values.view(torch.uint8))


def test_fp8_uses_the_whole_range():
    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16) * torch.logspace(-30, 30, 8, device="cuda")[:, None]
    values, _, row_scale, _ = nm_act.compress_packed(x.bfloat16(), activation_dtype=E4M3)
    assert (values.float().abs().amax(dim=-1) == 448).all()
    assert row_scale.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_fp8_never_drops_a_nan_or_infinity(dtype):
    x = hard_activations(33, 288, dtype)
    values, _, row_scale, _ = nm_act.compress_packed(x.cuda(), activation_dtype=E4M3)
    lost = ~x.isfinite().all(dim=-1).cuda()
    poisoned = values.float().isnan().any(dim=-1) | row_scale.isnan()
    assert torch.equal(poisoned, lost)


# ---- producers -------------------------------------------------------------------------------------------------------
def assert_close_to_pruned(packed, produced: torch.Tensor) -> None:
    """Rounding may differ by one unit from torch's, and flip a choice between near equals: compare as a whole."""
    pruned = reference.prune(produced, "2:4").float()
    is_e4m3 = packed.values.dtype == E4M3
    dense = packed.to_dense().float() * (packed.row_scale[:, None] if is_e4m3 else 1.0)
    assert (dense - pruned).norm() / pruned.norm() < (4e-2 if is_e4m3 else 3e-3)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("tokens", "in_features"), [(1, 32), (33, 288), (65, 4096), (5, 14336)])
def test_rms_norm_compress(dtype, activation_dtype, with_residual, tokens, in_features):
    x, residual = (torch.randn(tokens, in_features, device="cuda").to(dtype) for _ in range(2))
    weight, before = torch.randn(in_features, device="cuda").to(dtype), (x.clone(), residual.clone())
    packed = nm_act.rms_norm_compress(
        x, weight, 1e-6, residual if with_residual else None, activation_dtype=activation_dtype
    )
    expected = x + residual if with_residual else x
    assert_same_bits(packed.hidden, expected)
    assert torch.equal(x, before[0])  # inputs are read only
    assert torch.equal(residual, before[1])
    h = expected.float()
    normed = (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-6)).to(dtype) * weight
    assert_close_to_pruned(packed, normed)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
@pytest.mark.parametrize(("tokens", "in_features"), [(1, 32), (33, 288), (65, 4096), (5, 14336)])
def test_silu_mul_compress(dtype, activation_dtype, tokens, in_features):
    merged = torch.randn(tokens, 2 * in_features, device="cuda").to(dtype)
    gate, up = merged.chunk(2, dim=-1)
    for arguments in ((gate.contiguous(), up.contiguous()), (gate, up)):
        packed = nm_act.silu_mul_compress(*arguments, activation_dtype=activation_dtype)
        assert_close_to_pruned(packed, F.silu(gate) * up)


def test_halves_of_a_merged_projection_are_read_in_place():
    merged = torch.randn(2, 700, 2 * 4096, device="cuda").bfloat16()
    gate, up = merged.split(4096, dim=-1)
    expected = nm_act.silu_mul_compress(gate.contiguous(), up.contiguous())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed = nm_act.silu_mul_compress(gate, up)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.1 * sum(tensor.numel() * tensor.element_size() for tensor in packed) + 4096
    assert all(torch.equal(a, b) for a, b in zip(packed, expected, strict=True))
    for view in (gate[:, 3:], gate[:, ::2], merged[..., ::2], gate.transpose(0, 1)):
        assert torch.equal(nm_act.prune(view, "2:4"), nm_act.prune(view.contiguous(), "2:4"))


@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_producers_take_the_options_of_the_selection(activation_dtype):
    tokens, in_features = 33, 1024
    x, up = (torch.randn(tokens, in_features, device="cuda").bfloat16() for _ in range(2))
    scale, weight = torch.rand(in_features, device="cuda") + 0.5, torch.ones(in_features, device="cuda").bfloat16()
    options = {
        "channel_scale": scale,
        "token_shift": "mean",
        "variance_correction": True,
        "activation_dtype": activation_dtype,
    }
    normed = (x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + 1e-6)).bfloat16()
    for packed, produced in (
        (nm_act.rms_norm_compress(x, weight, 1e-6, **options), normed),
        (nm_act.silu_mul_compress(x, up, **options), F.silu(x) * up),
    ):
        expected = nm_act.compress_packed(produced, **options)
        torch.testing.assert_close(packed.eta, expected.eta, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(packed.row_scale, expected.row_scale, rtol=2e-2, atol=0)


@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_an_exact_product_is_compressed_to_the_same_bits(activation_dtype):
    x = torch.randn(33, 288, device="cuda").bfloat16()
    gate = torch.full_like(x, 60.0)  # SiLU(60) is 60 in bf16, so the product has no rounding of its own
    assert_same_bytes(
        nm_act.silu_mul_compress(gate, x, activation_dtype=activation_dtype),
        nm_act.compress_packed(gate * x, activation_dtype=activation_dtype),
    )


# ---- determinism and the smallest cases for compute-sanitizer --------------------------------------------------------
def test_ten_runs_give_the_same_bits():
    x, weight = torch.randn(300, 4096, device="cuda").bfloat16(), torch.randn(4096, device="cuda").bfloat16()
    options = {"token_shift": "mean", "variance_correction": True}
    calls = [
        lambda: nm_act.compress_packed(x, **options),
        lambda: nm_act.compress_packed(x, activation_dtype=E4M3, **options),
        lambda: nm_act.rms_norm_compress(x, weight, 1e-6, x, activation_dtype=E4M3, **options),
        lambda: nm_act.silu_mul_compress(x, x, **options),
        lambda: (nm_act.prune(x, "8:16", token_shift="mean"),),
    ]
    for call in calls:
        first = [part.clone() for part in call()]
        for _ in range(9):
            poison()
            assert_same_bytes(call(), first)


@pytest.mark.sanitizer
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_selections(dtype, tokens):
    x = hard_activations(tokens, 96, dtype)
    for name in SELECTIONS:
        options = selections(96)[name]
        for n, m in ((1, 2), (2, 4), (4, 8), (8, 16), (16, 32)):
            pruned = nm_act.prune(x.cuda(), f"{n}:{m}", **on_gpu(options))
            assert_same_bits(pruned.cpu(), reference.prune(x, f"{n}:{m}", **options), any_nan=True)
        values, metadata = nm_act.compress(x.cuda(), **on_gpu(options))
        assert_same_bits(values.cpu(), reference.compress(x, **options)[0], any_nan=True)
        assert torch.equal(nm_act.decompress(values, metadata).isnan().cpu(), pruned_nans(x, options))


def pruned_nans(x: torch.Tensor, options: dict) -> torch.Tensor:
    return reference.prune(x, "2:4", **options).isnan()


@pytest.mark.sanitizer
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_small_packed_and_producers(dtype, activation_dtype, tokens):
    x, up = torch.randn(tokens, 96).to(dtype).cuda(), torch.randn(tokens, 96).to(dtype).cuda()
    expected = reference.compress(x.cpu())[1]
    for view in (x, *strided(x).values()):
        values, metadata, *_ = nm_act.compress_packed(view, activation_dtype=activation_dtype)
        layout = packed_layout(values.dtype)
        assert torch.equal(nm_act.unpack_metadata(metadata.cpu(), tokens, 96, layout), expected)
    for token_shift in ("mean", "median"):
        row_scale = nm_act.compress_packed(
            x, activation_dtype=activation_dtype, token_shift=token_shift, variance_correction=True
        ).row_scale
        assert row_scale.isfinite().all()
    packed = nm_act.rms_norm_compress(x, up[0].contiguous(), 1e-6, up, activation_dtype=activation_dtype)
    h = (x + up).float()
    normed = (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-6)).to(dtype) * up[0]
    assert_close_to_pruned(packed, normed)
    assert_close_to_pruned(nm_act.silu_mul_compress(x, up, activation_dtype=activation_dtype), F.silu(x) * up)
    scale = torch.rand(96, device="cuda")
    results = []
    for weight, channel_scale in ((up[0].contiguous(), scale), (moved(up[0]), moved(scale))):
        normed = nm_act.rms_norm_compress(
            x, weight, 1e-6, up, channel_scale=channel_scale, activation_dtype=activation_dtype
        )
        results.append(
            (*normed, *nm_act.silu_mul_compress(x, up, channel_scale=channel_scale, activation_dtype=activation_dtype))
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
