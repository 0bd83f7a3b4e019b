"""explain's configuration of a kernel; explain_calls: every operator once, with its shapes, sparse products with their path."""

import pytest
import torch

import nm_act
from nm_act import LinearSpec, NMLinear, reference
from nm_act.ops import fused
from nm_act.ops.packed import sparse_gemm_silu_mul
from nm_act.ops.prepack import prepack_weight


def test_the_configuration_is_that_of_the_kernel():
    _C = nm_act._C
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    for weight in (x, x.t()):
        found = nm_act.explain(x, weight, device="cuda", multiprocessors=132)
        tile, raster, swizzle, *_ = _C.select_gemm_config("bf16", 4096, 4096, 4096, 132)
        name = next(each["name"] for each in _C.gemm_tiles("bf16") if each["tile"] == tile)
        along = "tokens" if raster == 1 else "outputs"
        assert (found.path, found.kernel) == ("sparse", f"{name}, swizzle {swizzle} along {along}, overlapped")
    found = nm_act.explain(x[:1], x.t(), "8:16", device="cuda", multiprocessors=132)
    lanes, splits, threads, ahead = _C.gather_configs(1, 4096, 4096, False, 8, 16, 9, 132)[0]
    assert found.kernel == f"{lanes} lanes, {splits} splits, {threads} threads" + ", ahead" * ahead
    assert str(found).endswith(f"only the rows of surviving inputs are read [{found.kernel}]")
    for device, tokens in (("cpu", 1), ("cpu", 9), ("cuda", 9)):
        assert nm_act.explain(x[:tokens], x.t(), "8:16", device=device).kernel == ""


def layer_of(pattern="8:16", **options):
    return NMLinear(64, 32, spec=LinearSpec(pattern, **options))


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_layers_calls_are_counted_by_shape_and_path(grad):
    layer = layer_of()
    with grad(), nm_act.explain_calls() as calls:
        for x in (torch.randn(1, 64), torch.randn(1, 64), torch.randn(9, 64)):
            layer(x)
    layer(torch.randn(1, 64))  # no more
    found = {(call.op, call.explanation.path): count for call, count in calls.items()}
    assert found == {("sparse_linear", "gather"): 2, ("sparse_linear", "dense"): 1}
    decode, prefill = calls
    assert decode.arguments == "x [1, 64] float32, weight [32, 64], bias [32], 8:16"
    assert prefill.explanation == nm_act.explain(torch.zeros(9, 64), layer.weight, "8:16")
    assert str(calls) == f"2 x sparse_linear({decode.arguments}): {decode.explanation}\n1 x {prefill}"


def test_results_and_gradients_are_the_same():
    layer, x = layer_of(mitigation=["var"]), torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    with nm_act.explain_calls() as calls:
        layer(x).sum().backward()
    assert torch.equal(x.grad, expected)
    assert [call.op for call in calls].count("sparse_linear") == 1


def test_every_operator_is_named_and_only_ours():
    x = torch.randn(3, 64)
    with nm_act.explain_calls() as calls:
        nm_act.decompress(*nm_act.compress(x))
        torch.nn.functional.linear(x, torch.randn(8, 64))
        nm_act.sparse_linear(x, torch.randn(8, 64), activation_dtype=torch.float32)
        nm_act.prune(x, "2:4+1")
    assert [(call.op, call.arguments) for call in calls] == [
        ("compress", "x [3, 64] float32"),
        ("decompress", "values [3, 32] float32, metadata [3, 8]"),
        ("sparse_linear", "x [3, 64] float32, weight [8, 64], 2:4"),
        ("prune", "x [3, 64] float32, 2:4+1"),
    ]
    assert [call.explanation is None for call in calls] == [True, True, False, True]


def test_fused_products_are_named_with_their_kernel():
    weight = torch.empty(4096, 28672, dtype=torch.bfloat16, device="meta").t()
    x, norm = weight.new_empty(1, 4096), weight.new_empty(4096)
    with nm_act.explain_calls() as calls:
        fused.decode_linear(x, weight, pattern="8:16", norm_weight=norm, eps=1e-5)
        fused.sandwich_linear(x, norm, x, norm, 1e-5, weight, pattern="2:4")
        fused.rms_norm_add(x, norm, 1e-5, x)
    decode, sandwich, add = calls
    for call, pattern in ((decode, (8, 16)), (sandwich, (2, 4))):
        lanes, splits, threads, ahead = nm_act._C.gather_configs(1, 28672, 4096, False, *pattern, 9, 132, True)[0]
        kernel = f"{lanes} lanes, {splits} splits, {threads} threads" + ", ahead" * ahead
        assert (call.explanation.path, call.explanation.device, call.explanation.kernel) == ("gather", "cuda", kernel)
        assert str(call).endswith(f"[{kernel}]")
    assert (
        decode.explanation.kernel != nm_act.explain(x, weight, "8:16", device="cuda").kernel
    )  # that of a lone product
    assert add.explanation is None


def meta(*sizes, dtype=torch.bfloat16):
    return torch.empty(*sizes, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("x", "weight", "most"),
    [
        (meta(7, 4096), meta(4096, 6144), 8),
        (meta(2, 3, 4096), meta(4096, 6144), 8),
        (meta(7, 4096), meta(4096, 6144, dtype=torch.int8), 4),  # two launches
    ],
)
def test_gather_linear_is_named_with_its_kernel(x, weight, most):
    bits8 = weight.element_size() == 1
    scale = weight.new_empty(6144, dtype=torch.float32) if bits8 else None
    with nm_act.explain_calls() as calls:
        nm_act.gather_linear(x, weight.t(), weight_scale=scale)
    [call] = calls
    tokens = min(x.shape[:-1].numel(), most)
    lanes, splits, threads, ahead = nm_act._C.gather_configs(tokens, 6144, 4096, bits8, 0, 0, 9, 132)[0]
    assert call.explanation.kernel == f"{lanes} lanes, {splits} splits, {threads} threads" + ", ahead" * ahead
    assert (call.explanation.path, call.explanation.device) == ("gather", "cuda")


def test_gather_linear_without_a_kernel():
    with nm_act.explain_calls() as calls:
        nm_act.gather_linear(meta(3, 64, dtype=torch.float32), meta(64, 32, dtype=torch.float32).t())
        nm_act.gather_linear(meta(3, 64), meta(64, 12).t())
        nm_act.gather_linear(meta(0, 64), meta(64, 32).t())
        nm_act.gather_linear(torch.zeros(3, 64), torch.zeros(64, 12).t())
    found = [(call.explanation.path, call.explanation.device, call.explanation.kernel) for call in calls]
    assert found == [("dense", "cuda", "")] * 3 + [("gather", "cpu", "")]
    reasons = (
        "float32 has no kernel",
        "do not fit the gather kernel",
        "there are no tokens",
        "rows of surviving inputs",
    )
    assert all(reason in call.explanation.why for reason, call in zip(reasons, calls, strict=True))


@pytest.mark.parametrize(
    ("options", "in_out", "adds", "why"),
    [
        ({}, True, False, "for any number of tokens"),
        ({"residual": meta(512, 6144)}, True, True, "its kernel adds the residual"),
        ({"residual": meta(512, 6144)}, False, False, "a pass of its own adds the residual"),
        ({"residual": meta(512, 6144), "column_scale": meta(6144)}, True, False, "a pass of its own adds the residual"),
    ],
)
def test_sparse_gemm_is_named_with_its_kernel(options, in_out, adds, why):
    weight = meta(4096, 6144).t() if in_out else meta(6144, 4096)
    operand = nm_act.compress_packed(meta(512, 4096))
    with nm_act.explain_calls() as calls:
        nm_act.sparse_gemm(operand, weight, **options)
    [call] = calls
    assert call.explanation.kernel == gemm_kernel("bf16", 512, 6144, 4096, residual=adds)
    assert (call.explanation.path, call.explanation.device) == ("sparse", "cuda")
    assert call.explanation.why.endswith(why)


HOPPER = {"compute_capability_major": 9, "multiprocessors": 132}


def gemm_kernel(dtype, *problem, residual=False):
    """The text of a sparse GEMM's launches for tokens, outputs and inputs on 132 multiprocessors."""
    plan = nm_act._C.select_gemm_plan(dtype, *problem, 132, residual)
    first, cut, second = plan[:6], plan[6:8], plan[8:]
    if not cut:
        return config_text(dtype, first)
    along = "tokens" if cut[0] == 1 else "outputs"
    return f"{cut[1]} {along}: {config_text(dtype, first)}; the rest: {config_text(dtype, second)}"


def config_text(dtype, config):
    tile, raster, swizzle, splits, overlapped, paced = config
    name = next(each["name"] for each in nm_act._C.gemm_tiles(dtype) if each["tile"] == tile)
    parts = [name, f"swizzle {swizzle} along {'tokens' if raster == 1 else 'outputs'}"]
    parts += [f"{splits} splits"] * (splits > 1) + ["streamed"] * (splits == 0)
    parts += ["overlapped"] * overlapped + ["paced"] * paced
    return ", ".join(parts)


@pytest.mark.parametrize(("shape", "along"), [((2350, 6144, 4096), "tokens"), ((640, 8192, 8192), "outputs")])
def test_both_launches_of_a_cut_product_are_named(shape, along):
    tokens, out_features, in_features = shape
    found = nm_act.explain(
        meta(tokens, in_features), meta(out_features, in_features), device="cuda", multiprocessors=132
    )
    assert found.kernel == gemm_kernel("bf16", *shape)
    assert f" {along}: k" in found.kernel
    assert "; the rest: k" in found.kernel


@pytest.mark.parametrize("dtype", ["bf16", "e4m3"])
def test_blocks_in_step_are_named(dtype):
    shape = 8050, 8192, 28672 if dtype == "e4m3" else 8192
    kernel = nm_act._C.choose_packed(
        shape[0], dtype, "bf16", (*shape[1:], shape[2], 1, True), False, dtype == "e4m3", False, False, **HOPPER
    )[2]
    assert kernel == gemm_kernel(dtype, *shape)
    assert kernel.endswith(", overlapped, paced")


def test_plans_are_remembered_apart():
    """Many problems in turn, with and without a residual: each is told its own plan, also when it comes back."""
    shapes = [(tokens, 64 * out, 1024) for tokens in (337, 640, 1000, 1500, 2350) for out in range(16, 96)]
    expected = {(shape, adds): gemm_kernel("bf16", *shape, residual=adds) for shape in shapes for adds in (False, True)}
    assert len(set(expected.values())) > 20
    for step in (1, 7, -1):
        for ((tokens, *features), adds), kernel in list(expected.items())[::step]:
            weight = (*features, 1, features[0], True)
            facts = {"shifted": False, "scaled": False, "residual": adds, "gated": False}
            assert nm_act._C.choose_packed(tokens, "bf16", "bf16", weight, **facts, **HOPPER)[2] == kernel


def test_the_gated_product_is_named_with_its_kernel():
    with nm_act.explain_calls() as calls:
        sparse_gemm_silu_mul(nm_act.compress_packed(meta(4096, 4096)), meta(4096, 28672).t())
    assert [*calls][-1].explanation.kernel.startswith("k128x256x64, ")
    assert (
        nm_act._C.choose_packed(9, "bf16", "bf16", (64, 64, 64, 1, True), False, False, False, False, 8, 108)[2] == ""
    )


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "14:16"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("in_out", [True, False])
def test_the_prepacked_path_is_the_one_that_ran(pattern, tokens, in_out):
    """The copy is of twice the weight, so the result tells which of the two was read."""
    x, weight = torch.randn(tokens, 64), torch.randn(32, 64)
    weight = weight.t().contiguous().t() if in_out else weight
    n, m = map(int, pattern.split(":"))
    with nm_act.explain_calls() as calls:
        y = torch.ops.nm_act.sparse_linear_prepacked(x, weight, prepack_weight(2 * weight), None, n, m)
    [call] = calls
    factor = {"prepacked": 2.0, "gather": 1.0}[call.explanation.path]
    torch.testing.assert_close(y, factor * reference.prune(x, pattern) @ weight.t(), atol=1e-4, rtol=1e-4)
    assert (call.explanation.device, call.explanation.kernel) == ("cpu", "")


def test_a_refused_call_is_not_counted():
    x, refused = torch.randn(3, 64), []
    with nm_act.explain_calls() as calls:
        for _ in range(2):
            with pytest.raises(ValueError, match="nm_act::sparse_linear expected") as error:
                nm_act.sparse_linear(x, torch.randn(8, 32))
            refused.append(str(error.value))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        nm_act.sparse_linear(x, torch.randn(8, 32))
    assert refused == [str(error.value)] * 2
    assert not calls


def test_compiled_code_runs_and_is_not_counted_twice():
    layer, x = layer_of(), torch.randn(9, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    expected = compiled(x)
    with nm_act.explain_calls() as calls:
        assert torch.equal(compiled(x), expected)
    assert sum(calls.values()) <= 1
