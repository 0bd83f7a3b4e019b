"""Lint and format check of the whole project; --fix applies what can be applied."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TYPED = [
    f"nm_act/{name}.py" for name in ("__init__", "files", "patterns", "reference", "supported", "version", "yaml_text")
]
TYPED += [
    f"nm_act/ops/{name}.py"
    for name in ("__init__", "composed", "explain", "formulas", "legacy", "lifting", "operators", "packed")
]
TYPED += [f"nm_act/{name}/__init__.py" for name in ("optimize", "parallel")]
TYPED += ["nm_act/layers/hooks.py", "nm_act/layers/stale.py", "nm_act/integrations/vllm.py"]
TYPED += ["nm_act/integrations/registration.py", "nm_act/cli/run.py", "tools/compare.py"]
"""Modules that mypy --strict accepts; what they import is not judged with them."""

CPP = {".h", ".cpp", ".cu", ".cuh"}


def main(arguments: list[str]) -> int:
    fix = "--fix" in arguments
    sources = [str(path) for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*") if path.suffix in CPP]
    scripts = Path(sys.executable).parent
    commands = [
        [scripts / "ruff", "check", *(["--fix"] if fix else []), ROOT],
        [scripts / "ruff", "format", *([] if fix else ["--check"]), ROOT],
        [scripts / "mypy", *TYPED],
        [scripts / "clang-format", *(["-i"] if fix else ["--dry-run", "--Werror"]), *sorted(sources)],
    ]
    missing = [command[0].name for command in commands if not command[0].exists()]
    if missing:
        print(f"expected {', '.join(missing)} in {scripts}, found none; install with: pip install -e '.[lint]'")
    found = [command for command in commands if command[0].exists()]
    return max(bool(missing), *(subprocess.run(command, cwd=ROOT).returncode for command in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
