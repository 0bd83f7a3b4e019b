"""Host microseconds of an eager decode call: NMLinear over nn.Linear, per pattern, on the CPU and on CUDA if present.

python benchmarks/bench_eager_overhead.py --pattern 8:16 2:4 --device cuda \
    --csv benchmarks/results/h100/eager_overhead.csv

The layer is small, so that the arithmetic is short. On CUDA only the enqueueing is timed: a block of calls fits
the launch queue, and the device is waited for between blocks, outside the timing. On the CPU the arithmetic counts
as well.
Dense and sparse blocks alternate; each figure is the median of the blocks.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timer import Rows
from torch import nn

from nm_act import LinearSpec, NMLinear

COLUMNS = (
    *("bench", "device", "pattern", "dtype", "size", "linear_us", "nm_linear_us", "overhead_us"),
    *("torch", "cuda", "commit", "date"),
)
CALLS = 100  # a block; CUDA's launch queue holds 1024 entries


def block_us(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds of the host per call, over one block of calls."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    elapsed = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return elapsed / CALLS * 1e6


def overhead(pattern: str, device: torch.device, dtype: torch.dtype, size: int, blocks: int) -> tuple[float, float]:
    """Median microseconds of one call of nn.Linear and of NMLinear of ``[size, size]`` on an input ``[1, 1, size]``."""
    dense = nn.Linear(size, size, bias=False, device=device, dtype=dtype)
    sparse = NMLinear.from_linear(dense, LinearSpec(pattern)).eval()
    x = torch.randn(1, 1, size, device=device, dtype=dtype)
    calls = [lambda: dense(x), lambda: sparse(x)]
    with torch.inference_mode():
        for call in calls:
            block_us(call, device)
        times = [[block_us(call, device) for call in calls] for _ in range(blocks)]
    dense_us, sparse_us = (statistics.median(column) for column in zip(*times, strict=True))
    return dense_us, sparse_us


def main(argv: list[str] | None = None) -> None:
    """Print one comma-separated row per device and pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", nargs="+", choices=["cpu", "cuda"], default=devices)
    parser.add_argument("--pattern", nargs="+", default=["2:4", "8:16"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--size", type=int, default=64, help="in_features and out_features")
    parser.add_argument("--blocks", type=int, default=101, help=f"timed blocks of {CALLS} calls")
    parser.add_argument("--csv", help="write the rows to this file")
    arguments = parser.parse_args(argv)
    if "cuda" in arguments.device and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, found none; use --device cpu")
    torch.set_num_threads(1)
    rows = Rows(arguments.csv, COLUMNS, bench="eager_overhead", dtype=arguments.dtype, size=arguments.size)
    print("device,pattern,dtype,size,linear_us,nm_linear_us,overhead_us")
    for name in arguments.device:
        for pattern in arguments.pattern:
            dtype = getattr(torch, arguments.dtype)
            dense_us, sparse_us = overhead(pattern, torch.device(name), dtype, arguments.size, arguments.blocks)
            row = [f"{us:.2f}" for us in (dense_us, sparse_us, sparse_us - dense_us)]
            print(name, pattern, arguments.dtype, arguments.size, *row, sep=",", flush=True)
            found = dict(zip(COLUMNS[5:8], row, strict=True))
            rows.append(device=torch.cuda.get_device_name() if name == "cuda" else name, pattern=pattern, **found)


if __name__ == "__main__":
    main()
