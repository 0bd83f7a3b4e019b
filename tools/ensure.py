"""Install packages only if one of the named modules is missing: ensure.py [--optional] MODULE... -- PIP_ARGUMENT...

The environment variable ENSURE_HINT is what to do if pip fails: a sentence, printed after pip's own words.

Nothing is fetched when all modules are there, so that the make targets run offline in a complete environment.
"""

import importlib.util
import os
import subprocess
import sys


def main(arguments: list[str]) -> int:
    optional = arguments[:1] == ["--optional"]
    split = arguments.index("--")
    modules, requirements = arguments[optional:split], arguments[split + 1 :]
    missing = [module for module in modules if not _is_there(module)]
    if not missing:
        return 0
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    code = subprocess.run([*pip, *requirements]).returncode
    if code and optional:
        print(f"{', '.join(missing)} could not be installed: the tests that need it will be skipped", file=sys.stderr)
        return 0
    if code and os.environ.get("ENSURE_HINT"):
        print(f"{', '.join(missing)} could not be installed: {os.environ['ENSURE_HINT']}", file=sys.stderr)
    return code


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a module in a package that is missing itself
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
