"""Lint and format check of the whole project; --fix applies what can be applied."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_TYPED = ("optimize/operands", "integrations/vllm_linear")
"""Modules that mypy --strict does not judge yet; the last one's bases come from vLLM, which is rarely installed."""

CPP = {".h", ".cpp", ".cu", ".cuh"}


def main(arguments: list[str]) -> int:
    fix = "--fix" in arguments
    sources = [str(path) for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*") if path.suffix in CPP]
    package = ROOT / "nm_act"
    typed = sorted({*package.rglob("*.py")} - {package / f"{name}.py" for name in NOT_TYPED})
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
