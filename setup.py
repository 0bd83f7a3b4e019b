"""Builds the two native libraries with CMake; everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def environment_python() -> str:
    """The interpreter to build for: the first whose environment, seen from outside an isolated build, has torch."""
    candidates = [sys.executable]
    if "VIRTUAL_ENV" in os.environ:
        candidates.append(str(Path(os.environ["VIRTUAL_ENV"]) / "bin" / "python"))
    # PYTHONPATH is how pip hides the environment from an isolated build.
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    for python in candidates:
        if subprocess.run([python, "-c", probe], env=outside).returncode == 0:
            return python
    sys.exit(
        f"expected torch 2.11 or newer in the environment to install into ({', '.join(candidates)}), found none; "
        "install torch there first: nm_act builds against it and downloads none itself"
    )


def tool(name: str) -> str:
    """A build tool from this interpreter's scripts folder or the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"expected {name} on the PATH, found none; install it with: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt; an editable install leaves the libraries beside the sources."""

    def run(self):
        package = ROOT / "nm_act" if self.inplace else ROOT / self.build_lib / "nm_act"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = tool("cmake")
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        configure += [
            f"-DPython_EXECUTABLE={environment_python()}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DNM_ACT_OUTPUT_DIR={package}",
            *os.environ.get("NM_ACT_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.run([cmake, "--build", build, "--parallel", jobs, "--target", "_C"], check=True)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


MEASURED = ("sparse_linear.csv", "families.csv", "patterns.csv", "decode.csv", "inference_turns.csv")
"""Tables that nm_act/lab/tables.py reads; in a checkout it finds them in benchmarks/results."""


class WithTables(build_py):
    """Puts the measured tables of every device into the package, nm_act/lab/results/DEVICE."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for table in sorted((ROOT / "benchmarks" / "results").glob("*/*.csv")):
            if table.name in MEASURED and (table.parent / MEASURED[0]).is_file():
                folder = Path(self.build_lib) / "nm_act" / "lab" / "results" / table.parent.name
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(table, folder / table.name)


setup(
    ext_modules=[Extension("nm_act._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithTables},
)
