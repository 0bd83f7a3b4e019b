"""CUDA gather kernel (sparse_linear of 1 to 4 tokens over a weight stored [in, out], gather_linear): selection, error, states."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, PATTERNS, assert_same_bits, hard_activations
from cuda_cases import DECODE_WEIGHTS as WEIGHTS
from cuda_cases import (
    E4M3,
    GPU_MARKS,
    HALVES,
    assert_within_twice_torch,
    moved,
    on_gpu,
    poison,
    quantise_weight,
    strided,
)
from cuda_cases import decode_problem as problem
from linear_cases import linear_options, relative_error, stored

import nm_act
from nm_act import reference

pytestmark = GPU_MARKS
TOKENS = (1, 2, 3, 4)
OPS = torch.ops.nm_act


# ---- selection, bit for bit ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (7, 8), (1, 32)])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("in_features", [32, 288, 4096])
def test_an_identity_weight_shows_the_selection(dtype, n, m, tokens, in_features):
    """y = P @ I: every output is one survivor or zero, so it must have the oracle's bits."""
    identity = torch.eye(in_features, device="cuda", dtype=dtype).t()  # stored [in, out], as the kernel needs it
    needed = 1 - (1 - n / m) ** tokens
    ties = torch.randint(-2, 3, (tokens, in_features)).to(dtype)
    scale, shift = torch.randn(in_features), torch.randn(in_features)
    scale[0], scale[1], scale[-1] = 0.0, float("inf"), float("nan")
    options = [{}, {"channel_scale": scale}, {"shift": shift, "shift_out": torch.zeros(in_features)}]
    for x in (torch.randn(tokens, in_features).to(dtype), ties):
        assert nm_act.explain(x.cuda(), identity, f"{n}:{m}").path == ("gather" if needed <= 0.95 else "dense")
        for chosen in options:
            y = nm_act.sparse_linear(x.cuda(), identity, pattern=f"{n}:{m}", **on_gpu(chosen))
            selection = {name: value for name, value in chosen.items() if name != "shift_out"}
            # A sum that holds a -0.0 and zeros is +0.0.
            assert_same_bits(y.cpu() + 0.0, reference.prune(x, f"{n}:{m}", **selection) + 0.0, what=f"{list(chosen)}")


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", ["same", "e4m3"])
def test_rows_that_no_token_needs_are_not_read(tokens, kind):
    x, weight, _, options = problem(tokens, 272, 512, kind=kind)
    dropped = (nm_act.prune(x, "8:16") == 0).all(dim=0)
    assert dropped.any()
    poisoned = weight.float().clone()
    poisoned[:, dropped] = float("nan")
    y = nm_act.sparse_linear(x, stored(poisoned.to(weight.dtype), "in_out"), pattern="8:16", **options)
    assert torch.equal(y, nm_act.sparse_linear(x, weight, pattern="8:16", **options))
    assert not y.isnan().any()


# ---- error against float64 -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_error_at_most_twice_torchs_own(dtype, kind, tokens):
    for out_features, in_features in ((528, 1056), (16, 32), (4096, 4096), (272, 14336), (10000, 256)):
        x, weight, bias, options = problem(tokens, out_features, in_features, dtype, kind)
        for pattern in ("2:4", "4:8", "8:16", "16:32"):
            assert nm_act.explain(x, weight, pattern).path == "gather"
            for given_bias in (bias, None):
                y = nm_act.sparse_linear(x, weight, given_bias, pattern, **options)
                assert_within_twice_torch(y, x, weight, given_bias, pattern, options, (out_features, in_features))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_option(dtype, kind, tokens):
    x, weight, bias, scale = problem(tokens, 272, 512, dtype, kind)
    for name, options in linear_options(512, 272).items():
        for given_bias in (bias, None):
            y = nm_act.sparse_linear(x, weight, given_bias, "8:16", **options, **scale)
            assert_within_twice_torch(y, x, weight, given_bias, "8:16", {**options, **scale}, name)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_kernel_does_not_take_stays_right(dtype, kind):
    """Other storages, sizes, token counts and patterns go elsewhere."""
    cases = [
        (1, 330, 1024, "in_out", "2:4"),
        (1, 7, 36, "in_out", "2:4"),
        (3, 272, 1024, "out_in", "8:16"),
        (5, 272, 1024, "in_out", "8:16"),
        (4, 272, 1024, "in_out", "12:16"),
        (600, 272, 1024, "in_out", "2:4"),
    ]
    for tokens, out_features, in_features, layout, pattern in cases:
        x, weight, bias, options = problem(tokens, out_features, in_features, dtype, kind, layout)
        y = nm_act.sparse_linear(x, weight, bias, pattern, **options)
        assert_within_twice_torch(y, x, weight, bias, pattern, options, (tokens, out_features, in_features, layout))


@pytest.mark.parametrize("tokens", [1, 3])
def test_strided_and_misaligned_operands(tokens):
    x, weight, bias, _ = problem(tokens, 272, 512)
    for name, view in strided(x).items():
        assert_within_twice_torch(nm_act.sparse_linear(view, weight, bias, "8:16"), x, weight, bias, "8:16", {}, name)
    for name, view in strided(weight.t().contiguous()).items():
        y = nm_act.sparse_linear(x, view.t(), bias, "8:16")
        assert_within_twice_torch(y, x, weight, bias, "8:16", {}, name)
    options = {"channel_scale": torch.rand(512, device="cuda"), "shift": torch.randn(512, device="cuda")}
    y = nm_act.sparse_linear(x, weight, moved(bias), "8:16", **{name: moved(v) for name, v in options.items()})
    assert_within_twice_torch(y, x, weight, bias, "8:16", options, "misaligned vectors")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_non_finite_inputs_reach_the_output(dtype, tokens):
    _, weight, _, _ = problem(1, 64, 128, dtype)
    for rows in hard_activations(6, 128, dtype).split(tokens):
        y = nm_act.sparse_linear(rows.cuda(), weight)
        dense = F.linear(reference.prune(rows, "2:4").cuda(), weight)
        assert torch.equal(y.isfinite(), dense.isfinite())
        assert torch.equal(y.isnan(), dense.isnan())


# ---- gather_linear ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", range(1, 9))
def test_gather_linear(dtype, tokens):
    for out_features, in_features in ((528, 1056), (40, 31), (4096, 4096)):
        x, weight, bias, _ = problem(tokens, out_features, in_features, dtype)
        x = torch.relu(x - 0.5)
        exact = F.linear(x.double(), weight.double(), bias.double())
        y = nm_act.gather_linear(x, weight, bias)
        assert relative_error(y, exact) <= 2 * relative_error(F.linear(x, weight, bias), exact)
        unread = weight.clone()
        unread[:, (x == 0).all(dim=0)] = float("nan")
        if dtype in HALVES and out_features % 8 == 0:
            assert torch.equal(nm_act.gather_linear(x, stored(unread, "in_out"), bias), y)
    assert torch.equal(nm_act.gather_linear(torch.zeros_like(x), weight, bias), bias.expand(tokens, -1))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["e4m3", "int8"])
@pytest.mark.parametrize("tokens", range(1, 9))
def test_gather_linear_of_8_bits(dtype, kind, tokens):
    """The product of an output head: every row is needed, four tokens at a time."""
    for out_features, in_features in ((528, 1056), (48, 40), (32064, 2048)):
        x, codes, bias, options = problem(tokens, out_features, in_features, dtype, kind)
        weight = codes.float() * options["weight_scale"][:, None]
        exact = F.linear(x.double(), weight.double(), bias.double())
        poison()
        y = nm_act.gather_linear(x, codes, bias, **options)
        assert relative_error(y, exact) <= 2 * relative_error(F.linear(x, weight.to(dtype), bias), exact)
        for token in range(tokens):
            assert (
                relative_error(nm_act.gather_linear(x[token : token + 1], codes, bias, **options), exact[[token]])
                < 1e-2
            )
    unfit = problem(tokens, 40, 48, dtype, kind)  # no kernel takes 40 outputs in 8 bits
    weight = unfit[1].float() * unfit[3]["weight_scale"][:, None]
    y = nm_act.gather_linear(*unfit[:3], **unfit[3])
    assert relative_error(y, F.linear(unfit[0].float(), weight, unfit[2].float())) < 1e-2


# ---- every configuration, determinism, streams, graphs, compile ------------------------------------------------------
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_every_configuration(kind, tokens):
    major = torch.cuda.get_device_capability()[0]
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    x, weight, _, options = problem(tokens, 4112, 2080, kind=kind)
    scale = options.get("weight_scale")
    configs = nm_act._C.gather_configs(tokens, 4112, 2080, kind != "same", 8, 16, major, multiprocessors)
    assert len(configs) > 4
    for config in configs:
        y, _ = OPS._tune_gather(x, weight, None, 8, 16, [*map(int, config)], weight_scale=scale)
        assert_within_twice_torch(y, x, weight, None, "8:16", options, config)
    first, _ = OPS._tune_gather(x, weight, None, 8, 16, [*map(int, configs[0])], weight_scale=scale)
    assert torch.equal(first, nm_act.sparse_linear(x, weight, None, "8:16", **options))
    drawn = [torch.randn(size, device="cuda").to(x.dtype) for size in ((2080,), (tokens, 4112))]
    around = {"norm_weight": drawn[0], "eps": 1e-5, "residual": drawn[1], "weight_scale": scale}
    fused, _ = OPS._tune_gather(x, weight, None, 8, 16, [*map(int, configs[0])], **around)
    assert relative_error(fused, OPS.decode_linear(x, weight, None, 8, 16, **around)) < 1e-2
    del around["residual"]
    sandwich = {"x_weight": torch.randn_like(drawn[0]), "x_residual": torch.randn_like(x)}
    pair = OPS._tune_gather(x, weight, None, 8, 16, [*map(int, configs[0])], **around, **sandwich)
    stock = OPS.sandwich_linear(x, *sandwich.values(), drawn[0], 1e-5, weight, None, 8, 16, weight_scale=scale)
    assert max(map(relative_error, pair, stock)) < 1e-2
    for wrong in ([24, 1, 512, 0], [16, 1, 512]):
        with pytest.raises(ValueError, match=r"expected a configuration .* that the gather kernel has"):
            OPS._tune_gather(x, weight, None, 8, 16, wrong, weight_scale=scale)


@pytest.mark.parametrize("options", [{}, {"token_shift": "mean"}, {"variance_correction": True}], ids=str)
def test_a_chain_of_decode_kernels_waits_for_each_link(options):
    """Overlapped launches: every kernel reads what the one before it wrote, its statistics of a token too."""
    x, weight, _, _ = problem(1, 4096, 4096)
    link = lambda y: nm_act.sparse_linear(y, weight, pattern="8:16", **options)  # noqa: E731
    expected = x
    for _ in range(20):
        expected = link(expected) * 1.0
        torch.cuda.synchronize()
    for _ in range(10):
        y = x
        for _ in range(20):
            y = link(y)
        assert torch.equal(y, expected)


def test_threads_whose_launches_differ_in_shared_memory():
    """The limit of dynamic shared memory belongs to a kernel, not to a launch: no thread may lower another's."""
    problems = [problem(4, 4096, in_features) for in_features in (28672, 8192, 1024)]
    expected = [nm_act.sparse_linear(x, weight, pattern="8:16") for x, weight, _, _ in problems]

    def work(index):
        x, weight, _, _ = problems[index % 3]
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [nm_act.sparse_linear(x, weight, pattern="8:16") for _ in range(200)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(y, expected[index % 3]) for y in results)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(24)))


def test_no_synchronisation_and_one_graph_for_any_batch(graphs):
    _, weight, bias, _ = problem(1, 272, 512)
    w8, scale = quantise_weight(weight)
    w8 = stored(w8, "in_out")

    def block(x):
        y = nm_act.sparse_linear(x, weight, bias, "8:16")
        return y + nm_act.sparse_linear(x, w8, pattern="8:16", weight_scale=scale)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=graphs.backend)
    for tokens in (2, 3, 4, 5, 600):
        x = torch.randn(tokens, 512, device="cuda").bfloat16()
        assert torch.equal(compiled(x), block(x))
    assert len(graphs) == 1
    x = torch.randn(1, 512, device="cuda").bfloat16()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck(dtype):
    x, weight, bias, _ = problem(2, 64, 128, dtype)
    w8, scale = quantise_weight(weight, torch.int8)
    torch.library.opcheck(OPS.sparse_linear.default, (x, weight, bias, 8, 16), {"token_shift": "mean"})
    torch.library.opcheck(OPS.sparse_linear.default, (x, stored(w8, "in_out"), bias, 8, 16), {"weight_scale": scale})
    torch.library.opcheck(OPS.gather_linear.default, (x, weight, bias), {})


def test_error_sentences():
    x, weight, _, options = problem(2, 64, 128, kind="e4m3")
    cases = [
        (TypeError, "expected weight_scale along with a weight in torch.float8_e4m3fn", lambda: nm_act.sparse_linear(x, weight)),
        (ValueError, "expected weight_scale of shape [64], got [2]", lambda: nm_act.sparse_linear(x, weight, weight_scale=options["weight_scale"][:2])),
        (ValueError, "expected weight_scale on the device of x", lambda: nm_act.sparse_linear(x, weight, weight_scale=options["weight_scale"].cpu())),
        (ValueError, "gather_linear expected at most 8 tokens, got 9", lambda: nm_act.gather_linear(torch.zeros(9, 128, device="cuda"), torch.zeros(128, 64, device="cuda").t())),
        (ValueError, "gather_linear expected a weight stored [in_features, out_features]", lambda: nm_act.gather_linear(x, torch.zeros_like(x))),
    ]  # fmt: skip
    for error, sentence, call in cases:
        with pytest.raises(error, match=re.escape(sentence)):
            call()


# ---- the smallest cases for compute-sanitizer ------------------------------------------------------------------------
@pytest.mark.sanitizer
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_small_products(kind, tokens):
    for out_features, in_features in ((48, 96), (272, 2080)):
        x, weight, bias, scale = problem(tokens, out_features, in_features, kind=kind)
        for options in ({}, {"token_shift": "mean"}, {"variance_correction": True}):
            y = nm_act.sparse_linear(x, weight, bias, "8:16", **options, **scale)
            assert relative_error(y, reference.sparse_linear(x, weight, bias, "8:16", **options, **scale)) < 8e-3
    assert weight.dtype in (torch.bfloat16, E4M3, torch.int8)
