"""Lint and format check of the whole project; --fix applies what can be applied."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPP = {".h", ".cpp", ".cu", ".cuh"}


def main(arguments: list[str]) -> int:
    fix = "--fix" in arguments
    sources = [str(path) for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*") if path.suffix in CPP]
    scripts = Path(sys.executable).parent
    commands = [
        [scripts / "ruff", "check", *(["--fix"] if fix else []), ROOT],
        [scripts / "ruff", "format", *([] if fix else ["--check"]), ROOT],
        [scripts / "clang-format", *(["-i"] if fix else ["--dry-run", "--Werror"]), *sorted(sources)],
    ]
    missing = [command[0].name for command in commands if not command[0].exists()]
    if missing:
        print(f"expected {', '.join(missing)} in {scripts}, found none; install with: pip install ruff clang-format")
        return 1
    return max(subprocess.run(command, cwd=ROOT).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
