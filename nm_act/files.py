"""Writes files and folders atomically, checks early whether they can be written, and handles JSON lines."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; ValueError unless all have `keys`; none if there is no file."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not set(keys) <= row.keys():
                raise ValueError(
                    f"expected {', '.join(keys)} in line {number} of {str(path)!r}, got {line[:80]!r}; remove the file"
                )
            rows.append(row)
    return rows


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write what `read_json_lines` reads, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that a file can be written at `path`, without touching an existing one.

    Meant for the start of a long job, so that minutes of work are not lost at its end. The check really creates (and
    removes) a temporary file next to `path`, whose folder must exist: permission bits alone say nothing about a full or
    read-only disk, or about a process that runs as root. Raises ValueError if `path` is a folder, a device or anything
    else that is not a plain file, OSError if its folder does not exist or does not accept new files.
    """
    target = _resolve(path)
    try:
        descriptor, probe = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise _sentence(path, target, error) from error
    os.close(descriptor)
    os.unlink(probe)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` to `path` in one step: readers see the old content or all of the new, never a part.

    The data goes to a temporary file in the same folder (so that the final rename stays within one file system),
    reaches the disk, and then takes the place of `path`. Text is written as UTF-8 with its line ends unchanged. A
    symbolic link is followed, so it stays a link. When anything goes wrong, Ctrl-C included, the temporary file is
    removed and `path` is unchanged. Raises TypeError if `data` is neither bytes nor str, ValueError if `path` is not a
    plain file, OSError if its folder does not exist or it cannot be written. Every message is one sentence.
    """
    if not isinstance(data, (bytes, str)):
        raise TypeError(f"expected bytes or str to write to {str(path)!r}, got {type(data).__name__}; encode it first")
    payload = data.encode("utf-8") if isinstance(data, str) else data
    target = _resolve(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode_for(target))
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise _sentence(path, target, error) from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Make sure that `new_folder` can create `path`, without touching an existing folder.

    Raises ValueError if `path` is a file, or a folder that is not empty, and OSError if the nearest existing parent
    folder does not accept new ones. The message is one sentence.
    """
    target = _resolve_folder(path)
    nearest = next(parent for parent in target.parents if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=nearest))
    except OSError as error:
        raise type(error)(
            f"cannot make the folder {str(path)!r}: {(error.strerror or str(error)).lower()}; choose another path"
        ) from error


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Create a folder in one step: the block writes into a temporary folder, which takes the place of `path` at the
    end.

    Until then `path` does not exist, or is the empty folder that it was. When anything goes wrong, Ctrl-C included, the
    temporary folder (beside `path`) is removed. Parent folders are created. Raises ValueError if `path` is a file, or a
    folder that is not empty, and OSError if the folder or a file in it cannot be written. The message is one sentence.
    """
    target = _resolve_folder(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent))
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            os.chmod(file, 0o666 & ~_umask())  # safetensors' own files are private
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise _sentence(path, target, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _resolve_folder(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))
    above = next(each for each in (target, *target.parents) if each.exists())
    if not above.is_dir():
        raise ValueError(f"expected a folder to write, but {str(above)!r} is a file; choose another path")
    if above == target and any(target.iterdir()):
        raise ValueError(f"expected a new or empty folder, but {str(path)!r} holds files; choose another path")
    return target


def _resolve(path: str | os.PathLike[str]) -> Path:
    """Follow links, and refuse targets that a rename would destroy, such as device nodes."""
    if not str(path):
        raise ValueError("expected the path of a file to write, got an empty one; name a file")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"expected a file to write, but {str(path)!r} is a folder; name a file inside it")
    if target.exists() and not target.is_file():
        raise ValueError(f"expected a plain file to write, but {str(path)!r} is not one; choose another path")
    return target


def _mode_for(target: Path) -> int:
    """The permission bits of the existing file, or those that plain `open` would give (mkstemp's are private)."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    return 0o666 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)  # the only portable way to read it is to set it
    os.umask(umask)
    return umask


def _sentence(path: str | os.PathLike[str], target: Path, error: OSError) -> OSError:
    if not target.parent.is_dir():
        reason = f"its folder {str(target.parent)!r} does not exist; create it or choose another path"
    else:
        reason = f"{(error.strerror or str(error)).lower()}; choose a path that can be written"
    return type(error)(f"cannot write {str(path)!r}: {reason}")
