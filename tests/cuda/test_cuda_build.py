"""CUDA sources compile without a device: no spills in hot kernels, sparse tensor-core instructions where they belong."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import compilers
import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc/kernels"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cutlass_include() -> Path | None:
    probe = "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
    package = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip()
    packages = [ROOT / "build/cutlass/cutlass_library", *([Path(package)] if package else [])]
    candidates = [ROOT / "third_party/cutlass/include", *(path / "source/include" for path in packages)]
    return next((path for path in candidates if (path / "cutlass/version.h").exists()), None)


CUTLASS = cutlass_include()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="no nvcc"),
    pytest.mark.skipif(CUTLASS is None, reason="no CUTLASS headers"),
]


def gemm(tile: str, value: str, output: str = "kBFloat16", storage: str = "out_in", arch: str = "sm90") -> str:
    """The source that CMakeLists.txt writes for a tile of csrc/kernels/matmul/tiles.h."""
    text = (ROOT / f"cmake/sparse_gemm_{arch}.cu.in").read_text()
    in_out = "true" if storage == "in_out" else "false"
    names = {"tile": tile, "value": value, "output": output, "storage": storage, "in_out": in_out}
    for name, replacement in names.items():
        text = text.replace(f"@{name}@", replacement)
    return text


PRUNE, GATHER = "prune", "gather"
SM80, SM90 = "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"
CASES = {
    "hopper": (gemm("k256x192x64", "kBFloat16"), SM90),
    "hopper_in_out": (gemm("k256x192x64", "kFloat16", "kFloat16", "in_out"), SM90),
    "two_row_blocks": (f"#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED\n{gemm('k256x160x64', 'kBFloat16')}", SM90),
    "overlapped": (gemm("k128x256x64", "kBFloat16"), SM90),
    "overlapped_e4m3": (gemm("k128x256x128E4M3", "kE4M3"), SM90),
    "few_tokens": (gemm("k64x64x256E4M3", "kE4M3"), SM90),
    "ampere": (gemm("k128x128x64", "kBFloat16", arch="sm80"), SM80),
    "compress": (f"{PRUNE}/compress.cu", SM90),
    "compress_windows": (f"{PRUNE}/compress_windows.cu", SM90),
    **{
        f"{name}-{number}": (f"{PRUNE}/{name}.cu", flags)
        for name in ("prune", "prune_windows")
        for number, flags in ((80, SM80), (90, SM90))
    },
    **{
        f"{weight}-{number}": (f"{GATHER}/gather_{weight}.cu", flags)
        for weight in ("bits16", "e4m3", "int8")
        for number, flags in ((80, SM80), (90, SM90))
    },
}
"""Name -> source (its file, or its text) and flags. The slowest come first: all are compiled beside the tests."""


def compile_kernels(source: str, folder: Path, *flags: str) -> tuple[str, str]:
    """ptxas's report and the PTX of one source."""
    folder.mkdir()
    common = ["-std=c++17", "-O3", "-DNDEBUG", "-DNM_ACT_CUDA", "-DCUTLASS_ENABLE_GDC_FOR_SM90"]
    common += ["--expt-relaxed-constexpr", "-Xptxas=-v", "--keep", "--keep-dir", folder]
    includes = [f"-I{KERNELS.parent}", f"-I{KERNELS}", f"-I{CUTLASS}"]
    file = KERNELS / source if "\n" not in source else folder / "gemm.cu"
    if "\n" in source:
        file.write_text(source)
    command = [NVCC, *common, *includes, *flags, "-cubin", "-o", folder / "out.cubin", file]
    result = compilers.run(*command)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stderr, "".join(path.read_text(errors="replace") for path in folder.glob("*.ptx"))


JOBS = {}


def start_compilers(names: list[str]) -> None:
    for name in sorted(names, key=list(CASES).index) if NVCC and CUTLASS else ():
        source, flags = CASES[name]
        JOBS[name] = compilers.submit(compile_kernels, source, compilers.folder() / name, flags)


@pytest.fixture
def compiled(name):
    """ptxas's report and the PTX of a case, once its compiler is done."""
    return JOBS[name].result()


def assert_no_spills(report: str, kernels: str = "") -> None:
    """No kernel whose mangled name matches the expression ``kernels`` spills registers, and there is one."""
    blocks = report.split("Compiling entry function '")[1:]
    stores = {block.split("'", 1)[0]: re.search(r"(\d+) bytes spill stores", block)[1] for block in blocks}
    hot = {name: int(size) for name, size in stores.items() if re.search(kernels, name)}
    assert hot
    assert not {name: size for name, size in hot.items() if size}


@pytest.mark.parametrize(
    ("name", "instruction"),
    [("hopper", r"m64n192k32\.f32\.bf16\.bf16"), ("hopper_in_out", r"m64n192k32\.f32\.f16\.f16")],
)
def test_hopper_gemm(compiled, instruction):
    report, ptx = compiled
    assert re.search(rf"wgmma\.mma_async\.sp\S*\.{instruction}", ptx)
    assert "griddepcontrol.wait" in ptx
    assert_no_spills(report)


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("two_row_blocks", r"m64n160k32\.f32\.bf16\.bf16"),
        ("overlapped", r"m64n256k32\.f32\.bf16\.bf16"),
        ("overlapped_e4m3", r"m64n256k64\.f32\.e4m3\.e4m3"),
        ("few_tokens", r"m64n64k64\.f32\.e4m3\.e4m3"),
    ],
)
def test_overlapped_mainloop(compiled, instruction):
    report, ptx = compiled
    assert re.search(rf"wgmma\.mma_async\.sp\S*\.{instruction}", ptx)
    # One batch stays in flight, and ptxas does not serialise what the loop overlaps.
    assert re.search(r"wgmma\.wait_group\.sync\.aligned 1", ptx)
    assert "griddepcontrol.wait" in ptx
    assert "serialized" not in report
    assert_no_spills(report)


@pytest.mark.parametrize("name", ["ampere"])
def test_ampere_gemm(compiled):
    report, ptx = compiled
    assert re.search(r"mma\.sp\S*\.m16n8k32\.row\.col\.f32\.bf16\.bf16", ptx)
    assert_no_spills(report)


@pytest.mark.parametrize(
    ("name", "hot"),
    [
        # Not hot: rows of float32, or unaligned ones (RowKind::kScalar), of more than 16384 features, which spill a little.
        ("compress", "compress_kernel|compress_row_kernel(?!.*(Float32|RowKindE2))"),
        ("compress_windows", "compress_windows_kernel"),
        *((f"{kernel}-{architecture}", "") for kernel in ("prune", "prune_windows") for architecture in (80, 90)),
    ],
)
def test_selection(compiled, hot):
    assert_no_spills(compiled[0], hot)


@pytest.mark.parametrize("name", [name for name, (source, _) in CASES.items() if source.startswith(GATHER)])
def test_gather(compiled, name):
    report, ptx = compiled
    # sm_80 has no instruction that converts e4m3: with several tokens that spills a little.
    assert_no_spills(report, "ELi1EEE" if name == "e4m3-80" else "")
    assert "createpolicy.fractional.L2::evict_first" in ptx
    assert "ld.global.nc.L1::no_allocate.L2::cache_hint.v4" in ptx
    assert ("mapa.shared::cluster" in ptx) == name.endswith("-90")
    if name.startswith("bits16"):  # two blocks of one token share a multiprocessor
        assert re.search(r"Used (6[0-4]|[1-5]\d) registers", report)
