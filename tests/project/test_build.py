"""The build: what is compiled says so, the kernels stay free of torch, the layouts equal CUTLASS's, errors name the remedy."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import compilers
import instruction_sets
import pybind11
import pytest
import torch

import nm_act

ROOT = Path(__file__).resolve().parents[2]
TORCH_FREE = [*(ROOT / "csrc/kernels").rglob("*"), *(ROOT / "csrc/cpu").rglob("*")]
needs_source = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not a source checkout")


def program(name: str) -> str | None:
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def configure(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """CMake with the options, besides those that find Python and Ninja."""
    found = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    found += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"]
    return compilers.run(program("cmake"), "-S", ROOT, "-B", build, *found, *options, env={**os.environ, **environment})


def test_build_info_names_the_running_torch():
    info = nm_act.build_info()
    assert info["torch"] == torch.__version__
    assert info["version"] == nm_act.__version__
    assert info["cpu_isa"] in info["cpu_isas"]
    assert info["cpu_isas"][-1] == "generic"
    assert info["cuda"] or info["why_no_cuda"]


def with_isa(isa: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "NM_ACT_CPU_ISA": isa}, capture_output=True, text=True)


@pytest.mark.parametrize("isa", nm_act.build_info()["cpu_isas"])
def test_every_instruction_set_gives_the_same(isa, tmp_path):
    done = with_isa(isa, instruction_sets.__file__, tmp_path / "out.pt")
    if "supports" in done.stderr:
        pytest.skip(f"this processor does not run {isa}")
    assert done.returncode == 0, done.stderr
    used, *outputs = torch.load(tmp_path / "out.pt")
    assert used == isa
    for actual, expected, rounding in zip(outputs, instruction_sets.results(), instruction_sets.ROUNDING, strict=True):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                actual[name], value, rtol=rounding, atol=rounding, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_unknown_instruction_set_is_one_sentence():
    result = with_isa("sse9", "-c", "import nm_act; nm_act.build_info()")
    assert "expected NM_ACT_CPU_ISA to name one of" in result.stderr
    assert "got 'sse9'; unset it" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["ppl", "model", "--text", "text.txt"],
        ["generate", "model", "x", "--pattern", "2:4"],
        ["generate", "model", "x"],
        ["convert", "model", "--pattern", "2:4", "--output", "out"],
        ["eval", "model", "--pattern", "2:4"],
        ["search", "model", "--target-speedup", "1.1"],
        ["calibrate", "model", "--recipe", "r.yaml", "--data", "text.txt", "--output", "out"],
        ["demo"],
    ],
    ids=" ".join,
)
def test_every_command_says_so_of_a_wrong_instruction_set_in_one_sentence(arguments):
    done = with_isa("mmx", "-m", "nm_act", *arguments)
    assert done.returncode == 2
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith("nm-act: expected NM_ACT_CPU_ISA to name one of")
    assert "got 'mmx'; unset it" in sentence


@needs_source
@pytest.mark.parametrize("path", [path for path in TORCH_FREE if path.is_file()], ids=lambda path: path.name)
def test_kernels_include_no_torch(path):
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11)/", path.read_text())


@needs_source
def test_missing_cutlass_names_all_three_remedies(tmp_path):
    result = configure(tmp_path, "-DNM_ACT_NATIVE_TESTS=ON", NM_ACT_CUTLASS_DIR=str(tmp_path / "nowhere"))
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert "git submodule update --init third_party/cutlass" in message
    assert "nvidia-cutlass==4.2.0.0" in message
    assert "NM_ACT_CUTLASS_DIR" in message


@needs_source
def test_wrong_cutlass_version_is_refused(tmp_path):
    header = tmp_path / "include/cutlass/version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 3\n#define CUTLASS_MINOR 5\n#define CUTLASS_PATCH 1\n")
    result = configure(tmp_path / "build", "-DNM_ACT_NATIVE_TESTS=ON", f"-DNM_ACT_CUTLASS_DIR={tmp_path}")
    assert result.returncode != 0
    assert "expected CUTLASS 4.2, found 3.5.1" in " ".join(result.stderr.split())


NATIVE = {
    "metadata_layout": 9_000_000,
    "select": 25_000_000,
    "gather": 2_000,
    "gather_config": 500,
    "compress": 25_000,
    "producers": 35_000,
    "prune": 13_000,
    "compress_windows": 13_000,
    "decode_attention": 4_000,
    "windows": 2_200_000,
    "gemm_config": 2_000,
    "pacer": 3_000,
}
"""Program under tests/native -> how many checks it makes at least."""
JOBS = {}


def native_programs(folder: Path, names: list[str]) -> list:
    """How CMake, the build and the programs by name ended, up to the first that did not go well."""
    done = [configure(folder, "-DNM_ACT_NATIVE_TESTS=ON")]
    if done[0].returncode == 0:
        done.append(compilers.run(program("cmake"), "--build", folder, "--target", *names))
    if done[-1].returncode == 0:
        done.append({name: compilers.run(folder / name) for name in names})
    return done


def start_compilers(names: list[str]) -> None:
    JOBS["native"] = compilers.submit(native_programs, compilers.folder() / "native", names)


@needs_source
@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_native_checks(name):
    """Layouts against CUTLASS, selection against a plain sort, the kernels' own source, choices: all on the host."""
    configured, *rest = JOBS["native"].result()
    reason = " ".join(configured.stderr.split())
    if "expected the CUTLASS 4.2 headers" in reason or "expected the CUDA headers" in reason:
        pytest.skip(reason)
    assert configured.returncode == 0, configured.stderr
    assert rest[0].returncode == 0, rest[0].stdout
    run = rest[1][name]
    assert run.returncode == 0, run.stdout
    checks = re.search(r"(\d+) checks, 0 failed", run.stdout)
    assert int(checks[1]) > NATIVE[name]


@needs_source
def test_the_clone_is_found_from_its_parent_folder(tmp_path):
    """An editable install is a path, not a finder behind all paths: there the folder nm_act would hide the package."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}
    (tmp_path / "nm_act").symlink_to(ROOT, target_is_directory=True)
    code = f"import sys; sys.path.append({str(ROOT)!r}); from nm_act import Recipe; print(Recipe.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.stdout == "nm_act.recipe\n", done.stderr
