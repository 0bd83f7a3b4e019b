"""CUDA linear layers: sparse_linear, with e4m3 activations too, and sparse_gemm against float64."""

import dataclasses

import pytest
import torch
from conftest import DTYPES, hard_activations
from cuda_cases import (
    E4M3,
    GPU_MARKS,
    HALVES,
    HOPPER,
    assert_within_twice_torch,
    moved,
    poison,
    problem,
    quantise_weight,
    sparse_linear_fp8,
    sparse_linear_fp8_oracle,
    strided,
)
from linear_cases import linear_options, relative_error, stored

import nm_act
from nm_act import reference

pytestmark = GPU_MARKS
LAYOUTS = ("out_in", "in_out")
TOKENS = (1, 2, 3, 5, 16, 17, 33, 64, 129, 300, 1000, 4097)
OPS = torch.ops.nm_act
# Fast accumulation of the e4m3 tensor cores keeps fewer bits than float32; the output's rounding is the rest.
FP8_LIMIT = {torch.bfloat16: 2.0**-8, torch.float16: 2e-3}


# ---- sparse_linear ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_error_at_most_twice_torchs_own(dtype, layout, tokens):
    x, weight, bias = problem(tokens, 520, 1040, dtype, layout)
    for pattern in ("2:4", "8:16", "4:8"):
        y = nm_act.sparse_linear(x, weight, bias, pattern)
        assert_within_twice_torch(y, x, weight, bias, pattern, {}, pattern)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 17, 129, 1000, 4097])
@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_every_option(dtype, layout, tokens, pattern):
    x, weight, bias = problem(tokens, 264, 512, dtype, layout)
    for name, options in linear_options(512, 264).items():
        for given_bias in (bias, None):
            y = nm_act.sparse_linear(x, weight, given_bias, pattern, **options)
            assert_within_twice_torch(y, x, weight, given_bias, pattern, options, name)


@pytest.mark.parametrize("tokens", [1, 4, 5, 200, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_a_float16_product_beyond_the_range_is_scaled_before_it_is_rounded(pattern, layout, tokens):
    x, weight = torch.full((tokens, 64), 250.0).half().cuda(), stored(torch.full((16, 64), 10.0).half().cuda(), layout)
    y = nm_act.sparse_linear(x, weight, None, pattern, column_scale=torch.full((16,), 0.25).cuda())
    assert (y == 20_000.0).all(), y  # 32 survivors x 250 x 10 is 80 000, beyond float16


@pytest.mark.parametrize("tokens", [3, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_shift_out_replaces_the_computed_one(tokens, layout):
    x, weight, _ = problem(tokens, 264, 512, torch.bfloat16, layout)
    shift = torch.randn(512, device="cuda")
    for options, image in (
        ({"shift": shift}, weight.float() @ shift),
        ({"token_shift": "mean"}, weight.float().sum(1)),
    ):
        options = {**options, "shift_out": 2 * image}
        y = nm_act.sparse_linear(x, weight, **options)
        assert_within_twice_torch(y, x, weight, None, "2:4", options, options)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("out_features", "in_features"), [(330, 1024), (512, 1000), (7, 36), (1, 64), (128, 1040)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_that_the_tensor_cores_do_not_take_stay_right(dtype, out_features, in_features, layout):
    for tokens in (1, 33, 1025):
        x, weight, bias = problem(tokens, out_features, in_features, dtype, layout)
        y = nm_act.sparse_linear(x, weight, bias)
        assert_within_twice_torch(y, x, weight, bias, "2:4", {}, tokens)


@pytest.mark.parametrize("tokens", [17, 1025])
def test_misaligned_and_strided_operands_stay_right(tokens):
    in_features, out_features = 512, 264
    x, weight, bias = problem(tokens, out_features, in_features)
    options = {"token_shift": "mean", "column_scale": torch.rand(out_features, device="cuda") + 0.5}
    for name, view in strided(x).items():
        y = nm_act.sparse_linear(view, weight, bias, **options)
        assert_within_twice_torch(y, x, weight, bias, "2:4", options, name)
    for layout in LAYOUTS:
        for name, view in strided(weight if layout == "out_in" else weight.t().contiguous()).items():
            y = nm_act.sparse_linear(x, view if layout == "out_in" else view.t(), bias)
            assert_within_twice_torch(y, x, weight, bias, "2:4", {}, (layout, name))
    vectors = {"column_scale": moved(options["column_scale"]), "shift_out": moved(weight.float().sum(1))}
    y = nm_act.sparse_linear(x, weight, moved(bias), **{**options, **vectors})
    assert_within_twice_torch(y, x, weight, bias, "2:4", options, "misaligned vectors")
    channel = torch.rand(in_features, device="cuda")
    y = nm_act.sparse_linear(x, weight, channel_scale=moved(channel))
    assert_within_twice_torch(y, x, weight, None, "2:4", {"channel_scale": channel}, "misaligned channel scale")


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0, 5), (2, 600)])
def test_leading_dimensions(leading):
    weight = (torch.randn(64, 128, device="cuda") / 8).bfloat16()
    x = torch.randn(*leading, 128, device="cuda").bfloat16()
    y = nm_act.sparse_linear(x, weight)
    assert y.shape == (*leading, 64)
    if y.numel():
        assert relative_error(y, reference.sparse_linear(x, weight)) < 4e-3
    w8, scale = quantise_weight(weight)
    assert sparse_linear_fp8(x, w8, scale).shape == (*leading, 64)


@pytest.mark.parametrize("tokens", [6, 1030])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_inputs_reach_the_output(tokens, layout):
    _, weight, _ = problem(1, 64, 128, torch.bfloat16, layout)
    x = hard_activations(tokens, 128, torch.bfloat16).cuda()
    lost = ~x.isfinite().all(dim=-1)
    y = nm_act.sparse_linear(x, weight)
    assert torch.equal((~y.isfinite()).any(dim=-1), lost)
    assert y[3].isnan().all()  # the row with a NaN


STREAMED = 0  # kStreamed of csrc/kernels/matmul/config.h


def tuned(packed, weight, config, column_scale=None, **terms):
    """sparse_gemm with a configuration of csrc/kernels/matmul/config.h."""
    options = {"row_scale": packed.row_scale, "eta": packed.eta, "column_scale": column_scale, **terms}
    return OPS._tune_sparse_gemm(packed.values, packed.metadata, packed.layout, weight, config, **options)


@HOPPER
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
@pytest.mark.parametrize("shape", [(512, 8192, 28672), (300, 4096, 4096), (64, 512, 1024)])
def test_overlapped_launches_wait_for_their_operands(activation_dtype, shape):
    """A GEMM that starts while the compression before it ends gives the bits of one in stream order, every time."""
    tokens, out_features, in_features = shape
    config = list(nm_act._C.select_gemm_config("e4m3" if activation_dtype else "bf16", *shape, 132))[:4]
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    weight, scale = quantise_weight(weight) if activation_dtype else (weight, None)

    def product(x, overlapped):
        packed = nm_act.compress_packed(x, activation_dtype=activation_dtype)
        return tuned(packed, weight, [*config, int(overlapped), 0], scale)

    for _ in range(10):
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        poison()
        assert torch.equal(product(x, True), product(x, False))


def packed_problem(activation_dtype, full, shape, layout="out_in"):
    """An operand, the weight that it meets, and the terms of their product: all that an epilogue has, if full."""
    x, weight, _ = problem(*shape, layout=layout)
    packed, scale = nm_act.compress_packed(x, activation_dtype=activation_dtype), None
    if activation_dtype:
        weight, scale = quantise_weight(weight)
    terms = {"column_scale": scale}
    if full:
        packed = dataclasses.replace(packed, eta=torch.randn(shape[0], device="cuda"))
        terms["shift_out"] = torch.randn(shape[1], device="cuda")
    return packed, weight, terms


@HOPPER
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 16, 64), (129, 272, 288), (200, 1024, 14336), (512, 10240, 4096), (2000, 12272, 320), (2000, 12272, 1280)],
)
def test_every_tile_makes_the_product_with_the_same_bits_each_time(activation_dtype, full, shape):
    packed, weight, terms = packed_problem(activation_dtype, full, shape)
    expected = nm_act.sparse_gemm(packed, weight, **terms)
    for tile in nm_act._C.gemm_tiles("e4m3" if activation_dtype else "bf16"):
        for raster, swizzle, splits in ((1, 1, 2), (2, 2, 3), (1, 2, 8), (1, 1, STREAMED)):
            config = [tile["tile"], raster, swizzle, splits if tile["split"] else 1, 0, 0]
            first = tuned(packed, weight, config, **terms)
            # Sums of the e4m3 tensor cores depend on where a tile is split.
            assert relative_error(first, expected) < (1e-2 if activation_dtype else 5e-3), config
            for _ in range(3):
                poison()
                assert torch.equal(tuned(packed, weight, config, **terms), first), config


@HOPPER
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(150, 272, 64), (700, 1040, 320), (2100, 4112, 1280)])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_a_cut_product_has_the_bits_of_its_parts(activation_dtype, full, shape, layout):
    """Every tile on either side of a cut, along the tokens and along the outputs, against the same tile uncut."""
    if activation_dtype and layout == "in_out":
        pytest.skip("e4m3 weights are stored [out, in]")
    packed, weight, terms = packed_problem(activation_dtype, full, shape, layout)
    tiles = [t for t in nm_act._C.gemm_tiles("e4m3" if activation_dtype else "bf16") if not t["split"]]
    whole = {}
    for tile in tiles:
        config = [tile["tile"], 1, 1, 1, int(tile["cluster_tokens"] * tile["cluster_outputs"] > 1), 0]
        whole[tuple(config)] = tuned(packed, weight, config, **terms)
    for i, (first, y) in enumerate(whole.items()):
        second = list(whole)[(i + 1) % len(whole)]
        for cut, size in ((1, shape[0]), (2, shape[1])):
            for at in {64, (size - 1) // 128 * 64, (size - 1) // 64 * 64} - {0}:
                poison()
                found = tuned(packed, weight, [*first, cut, at, *second], **terms)
                expected = torch.cat(
                    [y.split([at, size - at], cut - 1)[0], whole[second].split([at, size - at], cut - 1)[1]], cut - 1
                )
                assert torch.equal(found, expected), (first, cut, at, second)


PACED_SHAPE = (3000, 6176, 3104)  # 4.5 waves on 132 multiprocessors, no size a whole tile


def paced_tile(activation_dtype):
    (tile,) = (t["tile"] for t in nm_act._C.gemm_tiles("e4m3" if activation_dtype else "bf16") if t["can_pace"])
    return tile


@HOPPER
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_in_step_make_the_same_bits(activation_dtype, full, layout):
    """More launches than there are counters, in stream order and overlapped, and in a graph that is replayed."""
    if activation_dtype and layout == "in_out":
        pytest.skip("e4m3 weights are stored [out, in]")
    packed, weight, terms = packed_problem(activation_dtype, full, PACED_SHAPE, layout)
    tile = paced_tile(activation_dtype)
    for raster, swizzle, overlapped in ((1, 1, 0), (1, 8, 1), (2, 8, 1)):
        expected = tuned(packed, weight, [tile, raster, swizzle, 1, 0, 0], **terms)
        config = [tile, raster, swizzle, 1, overlapped, 1]
        poison()
        for _ in range(300):
            found = tuned(packed, weight, config, **terms)
        assert torch.equal(found, expected), config
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = [tuned(packed, weight, config, **terms) for _ in range(3)]
    for _ in range(3):
        for y in ys:
            y.zero_()
        graph.replay()
        assert all(torch.equal(y, expected) for y in ys)


@HOPPER
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_blocks_in_step_wait_for_none(activation_dtype):
    """After launches that used every counter twice, none runs out of patience: that would add 12 to some 60 us."""
    packed, weight, terms = packed_problem(activation_dtype, False, (2000, 6176, 3104), "out_in")
    tile, graphs, times = paced_tile(activation_dtype), {}, {0: [], 1: []}
    for paced in (1, 0):
        config = [tile, 2, 4, 1, 0, paced]
        for _ in range(600):
            tuned(packed, weight, config, **terms)
        torch.cuda.synchronize()
        graphs[paced] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[paced]):
            for _ in range(10):
                tuned(packed, weight, config, **terms)
    for _ in range(20):
        for paced, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[paced].append(start.elapsed_time(end))
    assert min(times[1]) < 1.12 * min(times[0]), (min(times[1]), min(times[0]))


@HOPPER
def test_only_some_tiles_can_be_kept_in_step():
    packed, weight, terms = packed_problem(None, False, (200, 1024, 320), "out_in")
    for tile in nm_act._C.gemm_tiles("bf16"):
        if not tile["can_pace"]:
            with pytest.raises(ValueError, match="a tile that can be paced, got " + tile["name"]):
                tuned(packed, weight, [tile["tile"], 1, 1, 1, 0, 1], **terms)


@HOPPER
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_launches_in_step_share_the_device(activation_dtype):
    """On three streams, none of which has all multiprocessors: the bits stay, and no block waits forever."""
    packed, weight, terms = packed_problem(activation_dtype, False, PACED_SHAPE, "out_in")
    tile = paced_tile(activation_dtype)
    expected = tuned(packed, weight, [tile, 1, 8, 1, 0, 0], **terms)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(3)], []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(tuned(packed, weight, [tile, 1, 8, 1, 0, 1], **terms))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in found)


CUT_SHAPES = {1: (4284, 3072, 3072), 2: (4096, 3584, 3584)}  # on 132 multiprocessors, in every type and storage


def require_cut(cut, activation_dtype, layout):
    """The multiprocessors of the shapes above; skips where another number may cut them otherwise."""
    if activation_dtype and layout == "in_out":
        pytest.skip("e4m3 weights are stored [out, in]")
    if torch.cuda.get_device_properties(0).multi_processor_count != 132:
        pytest.skip("the shapes are cut on 132 multiprocessors")
    kind, in_out = "e4m3" if activation_dtype else "bf16", layout == "in_out"
    assert nm_act._C.select_gemm_plan(kind, *CUT_SHAPES[cut], 132, weight_in_out=in_out)[6] == cut


@HOPPER
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
@pytest.mark.parametrize("cut", CUT_SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cut_product_has_every_term(activation_dtype, cut, layout):
    """Bias, scales, shift and residual of sparse_gemm; sparse_linear."""
    require_cut(cut, activation_dtype, layout)
    tokens, out_features, _ = CUT_SHAPES[cut]
    x, weight, bias = problem(*CUT_SHAPES[cut], layout=layout)
    packed, scale = nm_act.compress_packed(x, activation_dtype=activation_dtype), None
    if activation_dtype:
        weight, scale = quantise_weight(weight)
    eta, shift = torch.randn(tokens, device="cuda"), torch.randn(out_features, device="cuda")
    residual = torch.randn(tokens, out_features, device="cuda").to(torch.bfloat16)
    tile = nm_act._C.gemm_tiles("e4m3" if activation_dtype else "bf16")[0]["tile"]
    product = tuned(packed, weight, [tile, 1, 1, 1, 0, 0], scale).float()
    factor = 1 if scale is None else scale.float()

    def assert_close(y, expected):
        # A wrong part would be lost in the norm of the whole.
        for part in (slice(0, 64), slice(tokens - 64, tokens)):
            assert relative_error(y[part], expected[part]) < 1e-2
        for part in (slice(0, 64), slice(out_features - 64, out_features)):
            assert relative_error(y[:, part], expected[:, part]) < 1e-2
        assert relative_error(y, expected) < (1e-2 if activation_dtype else 5e-3)

    poison()
    y = nm_act.sparse_gemm(dataclasses.replace(packed, eta=eta), weight, bias, column_scale=scale, shift_out=shift)
    assert_close(y, product + factor * eta[:, None] * shift + bias.float())
    added = nm_act.sparse_gemm(packed, weight, bias, column_scale=scale, residual=residual)
    assert_close(added, product + bias.float() + residual.float())
    poison()
    options = {"weight_scale": scale, "activation_dtype": E4M3} if activation_dtype else {}
    assert_close(OPS.sparse_linear(x, weight, bias, 2, 4, **options), product + bias.float())


@HOPPER
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
@pytest.mark.parametrize("cut", CUT_SHAPES)
def test_launches_of_cut_products_wait_for_their_operands(activation_dtype, cut):
    """Compression, two launches and the compression of what they wrote, in a graph too: the bits of one tile, uncut."""
    require_cut(cut, activation_dtype, "out_in")
    tokens, out_features, in_features = CUT_SHAPES[cut]
    kind = "e4m3" if activation_dtype else "bf16"
    plan = nm_act._C.select_gemm_plan(kind, tokens, out_features, in_features, 132)
    assert all(splits == 1 for splits in (plan[3], plan[11]))  # whose sums depend on the shape
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) / in_features**0.5
    weight, scale = quantise_weight(weight) if activation_dtype else (weight, None)

    def pack(x):
        return nm_act.compress_packed(x, activation_dtype=activation_dtype)

    def chain(x):
        y = nm_act.sparse_gemm(pack(x), weight, column_scale=scale)
        return y, pack(y).values

    def apart(x):
        packed, sizes = pack(x), [plan[7], (tokens if cut == 1 else out_features) - plan[7]]
        whole = [tuned(packed, weight, [*config, 0, 0], scale) for config in (plan[:4], plan[8:12])]
        y = torch.cat([each.split(sizes, cut - 1)[i] for i, each in enumerate(whole)], cut - 1)
        torch.cuda.synchronize()
        return y, pack(y).values

    xs = [torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = [apart(x) for x in xs]
    for _ in range(5):
        for x, parts in zip(xs, expected, strict=True):
            poison()
            for found, part in zip(chain(x), parts, strict=True):
                assert torch.equal(found.view(torch.uint8), part.view(torch.uint8))
    graph, held = torch.cuda.CUDAGraph(), xs[0].clone()
    with torch.cuda.graph(graph):
        captured = chain(held)
    for x, parts in zip(xs, expected, strict=True):
        held.copy_(x)
        graph.replay()
        for found, part in zip(captured, parts, strict=True):
            assert torch.equal(found.view(torch.uint8), part.view(torch.uint8))


@HOPPER
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
def test_products_of_nothing(activation_dtype):
    weight = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    weight, scale = quantise_weight(weight) if activation_dtype else (weight, None)
    x = torch.empty(0, 128, device="cuda", dtype=torch.bfloat16)
    packed = nm_act.compress_packed(x, activation_dtype=activation_dtype)
    assert nm_act.sparse_gemm(packed, weight, column_scale=scale).shape == (0, 64)
    if not activation_dtype:
        assert nm_act.sparse_gemm_silu_mul(packed, stored(weight, "in_out")).values.shape == (0, 16)


@HOPPER
@pytest.mark.parametrize("activation_dtype", [None, E4M3])
@pytest.mark.parametrize("in_features", [64, 2048])
def test_vectors_of_blocks_with_many_tiles(activation_dtype, in_features):
    """The bias too; 2048 features in e4m3 have the widest tile, six a block."""
    tokens, out_features = 2000, 12272
    x, weight, bias = problem(tokens, out_features, in_features)
    packed, scale = nm_act.compress_packed(x, activation_dtype=activation_dtype), None
    if activation_dtype:
        weight, scale = quantise_weight(weight)
    draw = lambda size: torch.randn(size, device="cuda")  # noqa: E731
    eta, shift = draw(tokens), draw(out_features)
    product = nm_act.sparse_gemm(packed, weight, column_scale=scale).float()
    for _ in range(3):
        biased = nm_act.sparse_gemm(packed, weight, bias, column_scale=scale)
        assert relative_error(biased, product + bias.float()) < 5e-3
        shifted = nm_act.sparse_gemm(
            dataclasses.replace(packed, eta=eta), weight, bias, column_scale=scale, shift_out=shift
        )
        factor = 1 if scale is None else scale.float()
        assert relative_error(shifted, product + factor * eta[:, None] * shift + bias.float()) < 5e-3


# ---- sparse_gemm and its epilogue ------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 33, 129, 1000])
@pytest.mark.parametrize(("out_features", "in_features"), [(8, 32), (264, 288), (512, 4096)])
def test_sparse_gemm_epilogue(dtype, layout, tokens, out_features, in_features):
    x, weight, bias = problem(tokens, out_features, in_features, dtype, layout)
    packed = nm_act.compress_packed(x)
    pruned = reference.prune(x, "2:4")
    draw = lambda size: torch.randn(size, device="cuda")  # noqa: E731
    terms = {
        "row_scale": draw(tokens).abs() + 0.5,
        "eta": draw(tokens),
        "shift_out": draw(out_features),
        "column_scale": draw(out_features),
    }
    cases = ((), ("row_scale",), ("shift_out",), ("column_scale",), ("eta", "shift_out"), tuple(terms))
    for names in cases:
        chosen = {name: terms[name] for name in names}
        for given_bias in (None, bias):
            vectors = {name: chosen.get(name) for name in ("shift_out", "column_scale")}
            operand = dataclasses.replace(packed, **{name: chosen[name] for name in names if name not in vectors})
            y = nm_act.sparse_gemm(operand, weight, given_bias, **vectors)
            exact = epilogue(pruned, weight, given_bias, torch.float64, **chosen)
            torchs = relative_error(epilogue(pruned, weight, given_bias, dtype, **chosen), exact)
            assert y.dtype == dtype
            assert relative_error(y, exact) <= 2 * torchs, (names, given_bias is None)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 33, 1000])
def test_a_product_with_the_identity_is_the_pruned_activation(dtype, layout, tokens):
    """What the tensor cores read of the packed layout, place by place: sums of one value and zeros are exact."""
    x = torch.randn(tokens, 512, device="cuda").to(dtype)
    identity = stored(torch.eye(512, device="cuda", dtype=dtype), layout)
    assert torch.equal(nm_act.sparse_gemm(nm_act.compress_packed(x), identity), reference.prune(x, "2:4"))


def epilogue(pruned, weight, bias, dtype, row_scale=None, eta=None, shift_out=None, column_scale=None):
    y = pruned.to(dtype) @ weight.to(dtype).t()
    if row_scale is not None:
        y = y * row_scale.to(dtype)[:, None]
    if shift_out is not None:
        y = y + shift_out.to(dtype) * (1 if eta is None else eta.to(dtype)[:, None])
    if column_scale is not None:
        y = y * column_scale.to(dtype)
    return y if bias is None else y + bias.to(dtype)


# ---- e4m3 ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 129, 1000, 4097])
def test_fp8_against_float64_of_the_quantised_values(dtype, tokens):
    in_features, out_features = 1056, 528
    x, weight, bias = problem(tokens, out_features, in_features, dtype)
    w8, scale = quantise_weight(weight)
    for name, options in linear_options(in_features, out_features).items():
        for given_bias in (bias, None):
            y = sparse_linear_fp8(x, w8, scale, given_bias, **options)
            exact = sparse_linear_fp8_oracle(x, w8, scale, given_bias, **options)
            assert y.dtype == dtype
            assert relative_error(y, exact) < FP8_LIMIT[dtype], name


def test_fp8_error_at_most_twice_the_dense_fp8_products():
    x, weight, _ = problem(256, 512, 4096)
    w8, scale = quantise_weight(weight)
    packed = nm_act.compress_packed(x, activation_dtype=E4M3)
    quantised, row_scale = packed.to_dense(), packed.row_scale
    exact = (quantised.double() * row_scale.double()[:, None]) @ (w8.double() * scale.double()[:, None]).t()
    scales = {"scale_a": row_scale[:, None], "scale_b": scale[None, :], "out_dtype": torch.bfloat16}
    dense = torch._scaled_mm(quantised, w8.t(), use_fast_accum=True, **scales)
    ours = nm_act.sparse_gemm(packed, w8, column_scale=scale, out_dtype=torch.bfloat16)
    assert relative_error(ours, exact) <= 2 * relative_error(dense, exact)


def test_fp8_given_shift_out_is_in_units_of_the_weight():
    x, weight, _ = problem(130, 64, 256)
    w8, scale = quantise_weight(weight)
    image = 2 * (w8.double() * scale.double()[:, None]).sum(dim=1).float()
    options = {"token_shift": "mean", "shift_out": image}
    y = sparse_linear_fp8(x, w8, scale, **options)
    assert relative_error(y, sparse_linear_fp8_oracle(x, w8, scale, **options)) < FP8_LIMIT[torch.bfloat16]


# ---- the smallest cases for compute-sanitizer ------------------------------------------------------------------------
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [3, 70])
def test_small_gemms(dtype, layout, tokens):
    x, weight, bias = problem(tokens, 72, 160, dtype, layout)
    packed = nm_act.compress_packed(x, token_shift="mean", variance_correction=True)
    options = {"token_shift": "mean", "variance_correction": True}
    exact = reference.sparse_linear(x, weight, bias, **options)
    row_sums = weight.float().sum(dim=1)
    assert relative_error(nm_act.sparse_gemm(packed, weight, bias, shift_out=row_sums), exact) < 8e-3
    assert relative_error(nm_act.sparse_linear(x, weight, bias, **options), exact) < 8e-3
    other = reference.sparse_linear(x, weight, bias, "8:16")
    assert relative_error(nm_act.sparse_linear(x, weight, bias, "8:16"), other) < 8e-3


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [3, 70])
def test_small_fp8_gemms(dtype, tokens):
    x, weight, bias = problem(tokens, 80, 160, dtype)
    w8, scale = quantise_weight(weight)
    for options in ({}, {"token_shift": "mean", "variance_correction": True}):
        y = sparse_linear_fp8(x, w8, scale, bias, **options)
        assert relative_error(y, sparse_linear_fp8_oracle(x, w8, scale, bias, **options)) < FP8_LIMIT[dtype]
