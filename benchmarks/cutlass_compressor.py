"""CUTLASS's own 2:4 compressor (`cutlass_compressor.cu`), compiled at its first use and called through ctypes."""

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cu")
ROOT = SOURCE.parent.parent


def _include() -> Path:
    package = importlib.util.find_spec("cutlass_library")
    candidates = [
        *([Path(os.environ["NM_ACT_CUTLASS_DIR"])] if "NM_ACT_CUTLASS_DIR" in os.environ else []),
        ROOT / "third_party/cutlass",
        ROOT / "build/cutlass/cutlass_library/source",
        *([Path(package.submodule_search_locations[0]) / "source"] if package else []),
    ]
    folders = [path for candidate in candidates for path in (candidate / "include", candidate)]
    found = next((path for path in folders if (path / "cutlass/version.h").exists()), None)
    if found is None:
        raise RuntimeError("expected the CUTLASS headers, found none; set NM_ACT_CUTLASS_DIR")
    return found


@functools.cache
def _function():
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise RuntimeError("expected nvcc to build CUTLASS's compressor, found none; put it on the PATH")
    folder = tempfile.mkdtemp()
    library = Path(folder) / "compressor.so"
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-shared"]
    flags += ["-gencode=arch=compute_90a,code=sm_90a", f"-I{_include()}"]
    result = subprocess.run([nvcc, *flags, "-o", library, SOURCE], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"expected CUTLASS's compressor to compile, got: {result.stderr.strip()[-160:]}")
    function = ctypes.CDLL(str(library)).cutlass_compress_bf16
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 2 + [ctypes.c_void_p]
    return function


def compress(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[tokens, in / 2]`` and metadata of a pruned bfloat16 ``x`` (tokens % 64 == 0, in % 128 == 0)."""
    tokens, in_features = x.shape
    values = x.new_empty(tokens, in_features // 2)
    metadata = torch.empty(tokens * in_features // 8, dtype=torch.uint8, device=x.device)
    stream = torch.cuda.current_stream().cuda_stream
    status = _function()(x.data_ptr(), values.data_ptr(), metadata.data_ptr(), tokens, in_features, stream)
    if status:
        raise RuntimeError(f"expected CUTLASS's compressor to run, got CUDA error {status}")
    return values, metadata
