import functools
import subprocess
from pathlib import Path

__version__ = "0.2.0"


@functools.cache
def commit() -> str:
    """Commit of the checkout that the package runs from, with "-dirty" after changes; else the version."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an environment inside somebody's own repository
        return __version__
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
