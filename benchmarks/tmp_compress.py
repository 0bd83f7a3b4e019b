"""Temporary: prune and compression kernels without the operators, variants side by side.

    python benchmarks/tmp_compress.py build/variants/*.so
"""

import ctypes
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
package = types.ModuleType("nm_act")
package.__path__ = [str(ROOT / "nm_act")]
sys.modules["nm_act"] = package  # the oracle without the extension

import torch
from gpu_timer import DeviceCopy, copies_for, interleaved
from timer import percentiles

from nm_act import reference

LL, P, I = ctypes.c_longlong, ctypes.c_void_p, ctypes.c_int
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SHIFTS = ("none", "mean", "median")


def pointer(tensor):
    return P(0 if tensor is None else tensor.data_ptr())


class Library:
    def __init__(self, path):
        self.name, self.c = Path(path).stem, ctypes.CDLL(str(Path(path).resolve()))

    def check(self, status):
        if status != 0:
            raise SystemExit(f"{self.name}: CUDA error {status}")

    @property
    def stream(self):
        return P(torch.cuda.current_stream().cuda_stream)

    def prune(self, x, n, m, scale=None):
        out = torch.empty_like(x)
        self.check(self.c.run_prune(pointer(x), LL(x.stride(0)), pointer(out), pointer(scale), LL(x.shape[0]),
                                    I(x.shape[1]), I(n), I(m), I(TYPES[x.dtype]), self.stream))
        return out

    def compress(self, x, fp8=False, scale=None, shift="none", variance=False, neutral=False):
        t, k = x.shape
        values = torch.empty(t, k // 2, device="cuda", dtype=torch.float8_e4m3fn if fp8 else x.dtype)
        rows = t if neutral else (t + 63) // 64 * 64
        metadata = torch.empty(rows * ((k + 127) // 128 * 128 if not neutral else k) // 8, device="cuda", dtype=torch.uint8)
        row_scale = torch.empty(t, device="cuda") if fp8 or variance else None
        eta = torch.empty(t, device="cuda") if shift != "none" else None
        layout = 0 if neutral else 4 if fp8 else 3
        self.check(self.c.run_compress(pointer(x), LL(x.stride(0)), LL(t), I(k), I(TYPES[x.dtype]), pointer(values),
                                       pointer(metadata), pointer(row_scale), pointer(eta), pointer(scale),
                                       I(SHIFTS.index(shift)), I(variance), I(3 if fp8 else TYPES[x.dtype]), I(layout),
                                       self.stream))
        return values, metadata, row_scale, eta

    def statistic(self, x, kind, pruned=None):
        result = torch.empty(x.shape[0], device="cuda")
        self.check(self.c.run_statistics(pointer(x), LL(x.stride(0)), LL(x.shape[0]), I(x.shape[1]), I(TYPES[x.dtype]),
                                         pointer(pruned), pointer(result), I(kind), self.stream))
        return result


def inputs(k, dtype):
    x = torch.randn(16, k, device="cuda")
    x[1] = x[1].mul(2).round()  # ties
    x[2, ::2] = -0.0
    x[3], x[4] = 0, x[4].relu()
    x[5, 7], x[5, 9] = float("inf"), -float("inf")
    x[6, 3] = float("nan")
    x[7] = x[7].relu() - 0.0
    x[8] += 100
    x[9], x[10] = x[9] * 1e19, x[10] * 1e-23
    x[11] = 3.0
    x[12] = x[12] * 0.01 - 3
    return x.to(dtype)


def same(a, b):
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else torch.equal(a, b)


def verify(lib):
    bad = []
    for k in (32, 288, 4096, 14336, 16640):
        for dtype in TYPES:
            x = inputs(k, dtype)
            scale = torch.rand(k, device="cuda") + 0.1
            for n, m in ((1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (5, 8), (8, 16), (3, 16), (16, 32), (1, 32), (31, 32), (19, 32)):
                for s in (None, scale):
                    if not same(lib.prune(x, n, m, s), reference.prune(x, n, m, channel_scale=s)):
                        bad.append(f"prune {n}:{m} {k} {dtype} {s is not None}")
            finite = x[[0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]] if dtype != torch.float16 else x[[0, 1, 2, 3, 4, 7, 8, 11, 12]]
            for kind in (1, 2):
                eta = reference.token_shift_values(x, SHIFTS[kind])[:, 0]
                if not same(lib.statistic(x, kind), eta):
                    bad.append(f"{SHIFTS[kind]} {k} {dtype}")
            for s in (None, scale):
                for shift in SHIFTS:
                    for variance in (False, True):
                        v, meta, nu, _ = lib.compress(x, scale=s, shift=shift, variance=variance, neutral=True)
                        ev, em = reference.compress(x, channel_scale=s, token_shift=shift)
                        if not same(v, ev) or not same(meta.view(em.shape), em):
                            bad.append(f"compress {k} {dtype} {shift} {s is not None} {variance}")
            pruned = reference.prune(finite, 2, 4)
            want = reference.variance_ratio(finite, pruned)[:, 0]
            got = lib.statistic(finite.contiguous(), 0, pruned).double(), lib.compress(finite.contiguous(), variance=True, neutral=True)[2].double()
            for g in got:
                error = ((g - want).abs() / (want + 1e-6)).max().item()
                if not error < 1e-6:
                    bad.append(f"variance {k} {dtype} {error:.1e}")
    print(lib.name, "differs:" if bad else "equals the oracle", "; ".join(bad[:12]), len(bad), flush=True)


def bench(libs, tokens, k, seconds):
    copies = max(2, copies_for(tokens * k * 3))
    xs = [torch.randn(tokens, k, device="cuda").bfloat16() for _ in range(copies)]
    scale = torch.rand(k, device="cuda") + 0.5
    cases = {f"prune {n}:{m}": (4 * tokens * k, lambda l, x, n=n, m=m: l.prune(x, n, m))
             for n, m in ((2, 4), (4, 8), (8, 16), (16, 32))}
    for fp8 in (False, True):
        size = tokens * (2 * k + k // (2 if fp8 else 1) + k // 8)
        for name, options in (("plain", {}), ("scale", {"scale": scale}), ("variance", {"variance": True}),
                              ("mean", {"shift": "mean"}), ("median", {"shift": "median"})):
            cases[f"{'e4m3' if fp8 else 'bf16'} {name}"] = (size, lambda l, x, o=options, f=fp8: l.compress(x, f, **o))
    copy = DeviceCopy()
    calls = {"copy": [copy]}
    for lib in libs:
        for name, (_, call) in cases.items():
            calls[f"{lib.name} {name}"] = [lambda x=x, lib=lib, call=call: call(lib, x) for x in xs]
    times = interleaved(calls, seconds, eager=("copy",))
    speed = copy.bytes_per_us(times["copy"])
    print(f"\n{tokens} x {k}, copy {speed / 1e6:.2f} TB/s; us and fraction of copy, " + " | ".join(lib.name for lib in libs))
    for name, (size, _) in cases.items():
        cells = []
        for lib in libs:
            key = f"{lib.name} {name}"
            us = percentiles(times[key])[1] if key in times else float("nan")
            cells.append(f"{us:8.1f} {size / speed / us:5.0%}")
        print(f"{name:15}" + " | ".join(cells), flush=True)


libraries = [Library(path) for path in sys.argv[1:]]
for lib in libraries:
    if lib.name != "old":
        verify(lib)
torch.manual_seed(0)
for tokens, k in ((4096, 4096), (16384, 8192), (4096, 14336)):
    bench(libraries, tokens, k, 2.0)
