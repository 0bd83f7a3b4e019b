"""CUDA operators however they are called: streams, graphs, devices, threads, compile; opcheck and errors."""

import dataclasses
import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_cases import (
    DECODE_WEIGHTS,
    E4M3,
    GPU_MARKS,
    HALVES,
    assert_same_bytes,
    decode_calls,
    decode_problem,
    poison,
    problem,
    quantise_weight,
    sparse_linear_fp8,
)
from linear_cases import stored

import nm_act

pytestmark = GPU_MARKS
OPS = torch.ops.nm_act


# ---- streams, graphs, devices, threads, determinism ------------------------------------------------------------------
def calls_on(x, weight, bias):
    """Every operator over one x, by name; each returns a tuple of tensors."""
    w8, scale = quantise_weight(weight)
    norm = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)

    def packed_gemm():
        packed = nm_act.compress_packed(x, token_shift="mean", variance_correction=True)
        row_sums = weight.sum(dim=1, dtype=torch.float32)
        return nm_act.sparse_gemm(packed, weight, bias, shift_out=row_sums)

    return {
        "prune": lambda: (nm_act.prune(x, "8:16", token_shift="median"),),
        "compress": lambda: nm_act.compress(x),
        "compress_packed e4m3": lambda: nm_act.compress_packed(x, activation_dtype=E4M3),
        "rms_norm_compress": lambda: nm_act.rms_norm_compress(x, norm, 1e-6, x),
        "silu_mul_compress": lambda: nm_act.silu_mul_compress(x, x),
        "sparse_gemm": lambda: (packed_gemm(),),
        "sparse_linear": lambda: (nm_act.sparse_linear(x, weight, bias, token_shift="mean"),),
        "sparse_linear 8:16": lambda: (nm_act.sparse_linear(x, weight, bias, "8:16", variance_correction=True),),
        "sparse_linear_fp8": lambda: (sparse_linear_fp8(x, w8, scale, bias),),
    }


def snapshot(result):
    return [part.clone() for part in result]


def calls_of(kind, tokens, out_features, in_features):
    """x and the operators over it: those above, or of a decode step over a weight of this kind, stored [in, out]."""
    if kind == "out_in":
        x, *rest = problem(tokens, out_features, in_features)
        return x, calls_on(x, *rest)
    x, *rest = decode_problem(tokens, out_features, in_features, kind=kind)
    return x, {name: lambda call=call: (call(),) for name, call in decode_calls(x, *rest).items()}


@pytest.mark.parametrize(
    ("kind", "tokens", "sizes"),
    [("out_in", 2, (272, 512)), ("out_in", 1030, (272, 512)), ("same", 1, (4096, 4096)), ("same", 3, (4096, 4096))],
)
def test_work_runs_on_the_current_stream_after_what_came_before(kind, tokens, sizes):
    x, calls = calls_of(kind, tokens, *sizes)
    other, stream = x * 0.5 + 1, torch.cuda.Stream()
    x_before = x.clone()
    x.copy_(other)
    expected = {name: snapshot(call()) for name, call in calls.items()}
    for name, call in calls.items():
        x.copy_(x_before)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # a kernel on another stream would overtake the copy
            x.copy_(other)
            result = call()
        stream.synchronize()
        assert_same_bytes(result, expected[name], name)


@pytest.mark.parametrize(
    ("kind", "tokens"), [("out_in", 1), ("out_in", 33), ("out_in", 1030), *itertools.product(DECODE_WEIGHTS, (1, 4))]
)
def test_graph_replay_with_changed_inputs(kind, tokens):
    x, calls = calls_of(kind, tokens, *((272, 512) if kind == "out_in" else (4096, 1024)))
    inputs = [x.clone(), x * 0.5 + 1, torch.zeros_like(x)]
    for name, call in calls.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        for new in inputs:
            x.copy_(new)
            graph.replay()
            replayed = snapshot(result)
            assert_same_bytes(replayed, call(), name)


@pytest.mark.parametrize("shape", [(2**30 + 4, 4), (1, 2**30 + 64)])
def test_more_than_the_kernels_count(shape):
    """Of an expanded tensor, so that no memory is needed; nothing may be launched with a size that wrapped around."""
    x = torch.zeros(1, 1, device="cuda", dtype=torch.bfloat16).expand(shape)
    for call in (lambda: nm_act.prune(x, "2:4"), lambda: nm_act.compress(x), lambda: nm_act.silu_mul_compress(x, x)):
        with pytest.raises(ValueError, match=re.escape(f"expected at most {2**30} tokens of {2**30} features on CUDA")):
            call()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_other_device_than_the_current_one():
    x, weight, bias = problem(1030, 272, 512)
    expected = {name: snapshot(call()) for name, call in calls_on(x, weight, bias).items()}
    for name, call in calls_on(x.to("cuda:1"), weight.to("cuda:1"), bias.to("cuda:1")).items():
        result = call()
        assert all(part.device == torch.device("cuda:1") for part in result)
        assert_same_bytes([part.to("cuda:0") for part in result], expected[name], name)
    assert torch.cuda.current_device() == 0


def test_many_threads():
    problems = [problem(tokens, 272, 512) for tokens in (1, 7, 64, 129, 300, 1030)]
    all_calls = [calls_on(*arguments) for arguments in problems]
    expected = [{name: snapshot(call()) for name, call in calls.items()} for calls in all_calls]
    torch.cuda.synchronize()

    def work(index: int) -> None:
        calls, wanted, stream = all_calls[index % 6], expected[index % 6], torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(10):
                for name, call in calls.items():
                    assert_same_bytes(call(), wanted[name], name)
        stream.synchronize()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))


@pytest.mark.parametrize(
    ("kind", "tokens"), [*itertools.product(["out_in"], (1, 129, 4097)), *itertools.product(DECODE_WEIGHTS, (1, 4))]
)
def test_ten_runs_give_the_same_bits(kind, tokens):
    for name, call in calls_of(kind, tokens, *((1040, 2048) if kind == "out_in" else (4096, 4096)))[1].items():
        first = snapshot(call())
        for _ in range(9):
            poison()
            assert_same_bytes(call(), first, name)


def test_no_synchronisation():
    calls = calls_on(*problem(1030, 272, 512))
    for call in calls.values():
        call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls.values():
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- torch.compile and opcheck ---------------------------------------------------------------------------------------
def test_compile_fullgraph_one_graph_for_any_batch(graphs):
    _, weight, bias = problem(1, 272, 512)
    (w8, scale), norm = quantise_weight(weight), torch.ones(512, device="cuda").bfloat16()

    def block(x):
        packed = nm_act.compress_packed(x, activation_dtype=E4M3)
        normed = nm_act.rms_norm_compress(x, norm, 1e-6, x)
        gated = nm_act.silu_mul_compress(x, x)
        return (
            nm_act.sparse_linear(x, weight, bias),
            nm_act.prune(x, "8:16"),
            nm_act.sparse_gemm(packed, w8, column_scale=scale, out_dtype=x.dtype),
            nm_act.sparse_gemm(normed, weight) + nm_act.sparse_gemm(gated, weight, bias),
            sparse_linear_fp8(x, w8, scale, bias),
            nm_act.decompress(*nm_act.compress(normed.hidden)),
        )

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=graphs.backend)
    for tokens in (2, 3, 5, 17, 64, 129, 1030):
        x = torch.randn(tokens, 512, device="cuda").bfloat16()
        assert_same_bytes(compiled(x), block(x), tokens)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compile_with_inductor():
    _, weight, bias = problem(1, 272, 512)
    w8, scale = quantise_weight(weight)

    def block(x):
        hidden = torch.relu(x)
        return nm_act.sparse_linear(hidden, weight, bias) + 2 * sparse_linear_fp8(hidden, w8, scale)

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for tokens in (2, 129, 1030):
        x = torch.randn(tokens, 512, device="cuda").bfloat16()
        torch.testing.assert_close(compiled(x), block(x), rtol=2e-2, atol=2e-2)


NO_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ALL = ("test_schema", *NO_SCHEMA)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [3, 1030])
def test_opcheck(dtype, tokens):
    x, weight, bias = problem(tokens, 64, 128, dtype)
    (w8, scale), vector, out = quantise_weight(weight), torch.rand(128, device="cuda"), torch.rand(64, device="cuda")
    packed = nm_act.compress_packed(x, token_shift="mean", variance_correction=True)
    values, metadata, row_scale, eta = packed
    q_values, q_metadata, q_scale, _ = nm_act.compress_packed(x, activation_dtype=E4M3)
    checks = [
        (OPS.prune, (x, 8, 16), {"token_shift": "median"}),
        (OPS.compress, (x,), {"shift": vector}),
        (OPS.decompress, nm_act.compress(x), {}),
        (OPS.compress_packed, (x,), {}),
        (OPS.compress_packed, (x,), {"channel_scale": vector, "variance_correction": True, "token_shift": "mean"}),
        (OPS.compress_packed, (x,), {"activation_dtype": E4M3}),
        (OPS.rms_norm_compress, (x, vector.to(dtype), 1e-6), {}),
        (OPS.rms_norm_compress, (x, vector.to(dtype), 1e-6, x.clone()), {"activation_dtype": E4M3, "token_shift": "mean"}),
        (OPS.silu_mul_compress, (x, x.clone()), {"variance_correction": True}),
        (OPS.sparse_gemm, (values, metadata, packed.layout, weight, bias), {"row_scale": row_scale, "eta": eta, "shift_out": out}),
        (OPS.sparse_gemm, (q_values, q_metadata, "sm90_8bit", w8), {"row_scale": q_scale, "column_scale": scale, "out_dtype": dtype}),
        (OPS.sparse_linear, (x, weight, bias), {"column_scale": out, "variance_correction": True}),
        (OPS.sparse_linear, (x, weight, bias, 8, 16), {"token_shift": "mean"}),
        (OPS.sparse_linear, (x, w8, bias), {"token_shift": "median", "weight_scale": scale, "activation_dtype": E4M3}),
    ]  # fmt: skip
    if tokens <= 8:
        checks.append((OPS.gather_linear, (x, stored(weight, "in_out")), {}))
    for op, arguments, options in checks:
        # The schema test multiplies its results, which torch cannot do in e4m3.
        e4m3 = (
            options.get("activation_dtype")
            or "weight_scale" in options
            or any(argument is q_values or argument is w8 for argument in arguments)
        )
        torch.library.opcheck(op.default, tuple(arguments), options, test_utils=NO_SCHEMA if e4m3 else ALL)


# ---- errors ----------------------------------------------------------------------------------------------------------
def error_cases():
    x, weight, bias = problem(2, 64, 128)
    w8, scale = quantise_weight(weight)
    packed = nm_act.compress_packed(x)
    changed = lambda **fields: dataclasses.replace(packed, **fields)  # noqa: E731
    other = "sm80_16bit" if packed.layout != "sm80_16bit" else "sm90_16bit_t64"
    out, cpu = torch.ones(64, device="cuda"), torch.zeros(2, 128, dtype=torch.bfloat16)
    linear, gemm = nm_act.sparse_linear, nm_act.sparse_gemm
    return [
        (ValueError, "expected column_scale of shape [64], got [128]", lambda: linear(x, weight, column_scale=x[0])),
        (ValueError, "expected channel_scale of shape [128], got [64]", lambda: linear(x, weight, channel_scale=out)),
        (ValueError, "expected shift or token_shift along with shift_out", lambda: linear(x, weight, shift_out=out)),
        (ValueError, "expected weight on the device of x", lambda: linear(x, weight.cpu())),
        (ValueError, "expected column_scale on the device of x", lambda: linear(x, weight, column_scale=out.cpu())),
        (TypeError, "expected weight in the dtype of x, torch.bfloat16, got torch.float16", lambda: linear(x, weight.half())),
        (TypeError, "expected x in float32, bfloat16 or float16, got torch.float64", lambda: linear(x.double(), weight.double())),
        (ValueError, "expected in_features divisible by", lambda: nm_act.compress_packed(x[:, :40])),
        (ValueError, "expected in_features divisible by", lambda: nm_act.compress_packed(x[:, :48], activation_dtype=E4M3)),
        (TypeError, "expected x in bfloat16 or float16", lambda: nm_act.compress_packed(x.float())),
        (TypeError, "expected activation_dtype float8_e4m3fn or the dtype of x", lambda: nm_act.compress_packed(x, activation_dtype=torch.int8)),
        (ValueError, "expected either shift or token_shift, got both", lambda: nm_act.compress_packed(x, shift=x[0], token_shift="mean")),
        (ValueError, "expected weight of shape [128], got [64]", lambda: nm_act.rms_norm_compress(x, bias, 1e-6)),
        (ValueError, "expected residual of shape", lambda: nm_act.rms_norm_compress(x, x[0].contiguous(), 1e-6, x[:1])),
        (TypeError, "expected residual in", lambda: nm_act.rms_norm_compress(x, x[0].contiguous(), 1e-6, x.half())),
        (ValueError, "expected up of shape", lambda: nm_act.silu_mul_compress(x, x[:, :64])),
        (ValueError, "metadata bytes", lambda: gemm(changed(metadata=packed.metadata[:-1]), weight)),
        (ValueError, "expected row_scale of shape [2], got [64]", lambda: gemm(changed(row_scale=out), weight)),
        (ValueError, "expected contiguous values", lambda: OPS.sparse_gemm(packed.values, packed.metadata, packed.layout, weight[:, :64])),
        (ValueError, f"expected an operand in the layout {packed.layout}", lambda: gemm(changed(layout=other), weight)),
        (ValueError, "expected weight of shape [out_features, 128]", lambda: gemm(packed, weight[:, :64])),
        (TypeError, "expected weight in the dtype of values", lambda: gemm(packed, weight.half())),
        (NotImplementedError, "expected a compiled combination", lambda: gemm(packed, weight[:7])),
        (TypeError, "float8_e4m3fn", lambda: linear(x, weight, weight_scale=scale, activation_dtype=E4M3)),
        (ValueError, "expected weight_scale of shape [64], got [2]", lambda: linear(x, w8, weight_scale=scale[:2], activation_dtype=E4M3)),
        (NotImplementedError, "expected a compiled combination", lambda: linear(x, w8.t().contiguous().t(), weight_scale=scale, activation_dtype=E4M3)),
        (NotImplementedError, "CUDA", lambda: nm_act.compress_packed(cpu)),
        (NotImplementedError, "CUDA", lambda: nm_act.silu_mul_compress(cpu, cpu)),
        (NotImplementedError, "CUDA", lambda: linear(cpu, w8.cpu(), weight_scale=scale.cpu(), activation_dtype=E4M3)),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(29))
def test_error_sentences(index):
    cases = error_cases()
    assert len(cases) == 29
    error, sentence, call = cases[index]
    with pytest.raises(error, match=re.escape(sentence)):
        call()
    torch.cuda.synchronize()  # nothing was launched that fails later
