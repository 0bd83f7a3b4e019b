"""CUDA sources compile without a device: no spills in hot kernels, sparse tensor-core instructions where they belong."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc/kernels"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cutlass_include() -> Path | None:
    probe = "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
    package = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip()
    candidates = [ROOT / "third_party/cutlass/include", *([Path(package) / "source/include"] if package else [])]
    return next((path for path in candidates if (path / "cutlass/version.h").exists()), None)


CUTLASS = cutlass_include()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="no nvcc"),
    pytest.mark.skipif(CUTLASS is None, reason="no CUTLASS headers"),
]


def compile_kernels(source: Path, folder: Path, *architecture: str) -> tuple[str, str]:
    """ptxas's report and the PTX of one source."""
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-DNM_ACT_CUDA", "--expt-relaxed-constexpr", "-Xptxas=-v", "--keep"]
    flags += ["-DCUTLASS_ENABLE_GDC_FOR_SM90"]
    includes = [f"-I{KERNELS.parent}", f"-I{KERNELS}", f"-I{CUTLASS}"]
    command = [
        NVCC,
        *flags,
        *includes,
        *architecture,
        "--keep-dir",
        folder,
        "-cubin",
        "-o",
        folder / "out.cubin",
        source,
    ]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stderr, "".join(path.read_text(errors="replace") for path in folder.glob("*.ptx"))


def assert_no_spills(report: str, kernels: str = "") -> None:
    """No kernel whose name contains ``kernels`` spills registers, and there is one."""
    blocks = report.split("Compiling entry function '")[1:]
    stores = {block.split("'", 1)[0]: re.search(r"(\d+) bytes spill stores", block)[1] for block in blocks}
    hot = {name: int(size) for name, size in stores.items() if kernels in name}
    assert hot
    assert not {name: size for name, size in hot.items() if size}


def test_hopper_gemm(tmp_path):
    source = KERNELS / "matmul/inst/sm90_bf16_out_in_256x128x128.cu"
    report, ptx = compile_kernels(source, tmp_path, "-gencode=arch=compute_90a,code=sm_90a")
    assert re.search(r"wgmma\.mma_async\.sp\S*\.m64n128k32\.f32\.bf16\.bf16", ptx)
    assert "griddepcontrol.wait" in ptx
    assert_no_spills(report)


def test_overlapped_candidate(tmp_path):
    source = KERNELS / "matmul/inst/tuning_sm90_e4m3_128x256x128_overlapped.cu"
    report, ptx = compile_kernels(source, tmp_path, "-gencode=arch=compute_90a,code=sm_90a", "-DNM_ACT_TUNING_TILES")
    assert re.search(r"wgmma\.mma_async\.sp\S*\.m64n256k64\.f32\.e4m3\.e4m3", ptx)
    # One batch stays in flight, and ptxas does not serialise what the loop overlaps.
    assert re.search(r"wgmma\.wait_group\.sync\.aligned 1", ptx)
    assert "serialized" not in report
    assert_no_spills(report)


def test_ampere_gemm(tmp_path):
    report, ptx = compile_kernels(
        KERNELS / "matmul/inst/sm80_bf16_out_in.cu", tmp_path, "-gencode=arch=compute_80,code=sm_80"
    )
    assert re.search(r"mma\.sp\S*\.m16n8k32\.row\.col\.f32\.bf16\.bf16", ptx)
    assert_no_spills(report)


@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("name", ["prune", "prune_windows"])
def test_prune(tmp_path, name, architecture):
    flags = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    report, _ = compile_kernels(KERNELS / f"prune/{name}.cu", tmp_path, flags)
    assert_no_spills(report)


@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("weight", ["bits16", "e4m3", "int8"])
def test_gather(tmp_path, weight, architecture):
    flags = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    report, ptx = compile_kernels(KERNELS / f"gather/gather_{weight}.cu", tmp_path, flags)
    assert_no_spills(report)
    assert "ld.global.nc.L1::no_allocate.v4" in ptx
    assert ("mapa.shared::cluster" in ptx) == (architecture == "90a")
    if weight == "bits16":  # two blocks of one token share a multiprocessor
        assert re.search(r"Used (6[0-4]|[1-5]\d) registers", report)


def test_compress(tmp_path):
    report, _ = compile_kernels(KERNELS / "prune/compress.cu", tmp_path, "-gencode=arch=compute_90a,code=sm_90a")
    # The row kernels for more than 16384 features spill a little: they are not the hot ones.
    assert_no_spills(report, "compress_kernel")


def test_compress_windows(tmp_path):
    source = KERNELS / "prune/compress_windows.cu"
    report, _ = compile_kernels(source, tmp_path, "-gencode=arch=compute_90a,code=sm_90a")
    assert_no_spills(report, "compress_windows_kernel")
