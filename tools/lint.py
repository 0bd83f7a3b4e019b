"""Lint and format check of the whole project; --fix applies what can be applied."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TYPED = {
    "": "__init__ files moved patterns recipe reference supported version yaml_text",
    "ops": "__init__ autograd composed e4m3 explain formulas gradients legacy lifting operators packed",
    "methods": "__init__ criteria mitigations",
    "parallel": "__init__ row shard sizes",
    "layers": "__init__ hooks kv_cache linear stale tokens work",
    "optimize": "__init__ changed fp8 model readonly",
    "conversion": "__init__ adapters calibration fingerprint macs permutation sparsify undo",
    "integrations": "__init__ registration tensor_parallel transformers vllm",
    "cli": "__init__ run",
}
"""Folder -> modules that mypy --strict accepts; what they import is not judged with them."""

CPP = {".h", ".cpp", ".cu", ".cuh"}


def main(arguments: list[str]) -> int:
    fix = "--fix" in arguments
    sources = [str(path) for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*") if path.suffix in CPP]
    typed = [Path("nm_act", room, f"{name}.py") for room, names in TYPED.items() for name in names.split()]
    scripts = Path(sys.executable).parent
    commands = [
        [scripts / "ruff", "check", *(["--fix"] if fix else []), ROOT],
        [scripts / "ruff", "format", *([] if fix else ["--check"]), ROOT],
        [scripts / "mypy", *typed, "tools/compare.py"],
        [scripts / "clang-format", *(["-i"] if fix else ["--dry-run", "--Werror"]), *sorted(sources)],
    ]
    missing = [command[0].name for command in commands if not command[0].exists()]
    if missing:
        print(f"expected {', '.join(missing)} in {scripts}, found none; install with: pip install -e '.[lint]'")
    found = [command for command in commands if command[0].exists()]
    return max(bool(missing), *(subprocess.run(command, cwd=ROOT).returncode for command in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
