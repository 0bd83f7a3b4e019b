"""Folders of runs: the identity of a run, and one file per result."""

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import write_atomic
from ...version import commit
from ..output import RUN_FILE, check_output, make_folder, read_object, write_json
from .variants import Variant

PERPLEXITY = "wikitext2"
"""The task that is a perplexity; all others are the harness's."""

_FORMAT = 2
"""Format of a run's files: 2 adds the tokens and window in use to the identity."""


@dataclass(frozen=True)
class RunFolder:
    """A folder with one run: ``run.json`` has its identity, ``rows/`` one file per result."""

    path: Path
    identity: dict[str, Any]  # settings that comparable results share: model, dtype, limit, windows, data

    @classmethod
    def open(cls, path: str | Path, identity: dict[str, Any]) -> "RunFolder":
        """Create the folder, or continue the run in it.

        A run may gain tasks: the data of common tasks have to be equal, and so have the settings of common kinds of
        tasks (windows for a perplexity, the limit for the harness's tasks). Raises ValueError if the folder holds
        another run (it names the first difference), other files, or a ``run.json`` of another program, command or
        format.
        """
        path = Path(path)
        check_output(path)
        file = path / RUN_FILE
        found = _read_identity(file) if file.is_file() else None
        make_folder(path / "rows", path, "--output")
        merged = identity if found is None else _merged(found, identity, path)
        if merged != found:
            write_json(file, {"format": _FORMAT, "identity": merged})
        return cls(path, merged)

    def result_path(self, variant: Variant, task: str) -> Path:
        """File of one result."""
        return self.path / "rows" / f"{variant.slug}.{task}.json"

    def has(self, variant: Variant, task: str) -> bool:
        """Whether the result exists; ValueError if it is that of another recipe or calibration with the same name."""
        path = self.result_path(variant, task)
        if not path.is_file():
            return False
        found, wanted = _read_result(path)["variant"], variant.to_dict()
        if any(found.get(key) != wanted[key] for key in ("recipe", "calibrated", "seed", "calibration")):
            raise ValueError(
                f"expected in {str(path)!r} a result of this recipe and calibration, got one of another with the name "
                f"{variant.name!r}; rename it, remove the file or choose another --output"
            )
        return True

    def write(self, variant: Variant, task: str, result: dict[str, Any]) -> None:
        """Write one result, whole or not at all."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        record = {"variant": variant.to_dict(), "task": task, **result, "commit": commit(), "date": today}
        write_atomic(self.result_path(variant, task), json.dumps(record) + "\n")

    @staticmethod
    def read(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Identity and results of a finished or unfinished run; ValueError if the folder holds none."""
        path = Path(path)
        if not (path / RUN_FILE).is_file():
            raise ValueError(
                f"expected the folder of an evaluation, got {str(path)!r} without {RUN_FILE}; check the path"
            )
        identity = _read_identity(path / RUN_FILE)
        return identity, [_read_result(file) for file in sorted((path / "rows").glob("*.json"))]


_RESULT = ("variant", "task", "metric", "value", "stderr", "samples", "scores", "commit", "date")


def _read_result(path: Path) -> dict[str, Any]:
    found = read_object(path)
    lacking = next((key for key in _RESULT if key not in found), None)
    if lacking is not None:
        raise ValueError(f"expected a result in {str(path)!r}, got something without {lacking}; remove the file")
    return found


def _merged(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    """Identity of the run with the tasks of both; ValueError if the two belong to different runs."""
    if "data" in found and "data" in wanted:
        before, now = found["data"], wanted["data"]
        for task in sorted(before.keys() & now.keys()):
            _check_same(f"data of {task}", before[task], now[task], path)
        parts: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], bool]], ...] = (
            (("tokens", "window"), lambda data: PERPLEXITY in data),
            (("limit",), lambda data: any(task != PERPLEXITY for task in data)),
        )
        for keys, used in parts:
            if not used(now):
                wanted = {**wanted, **{key: found.get(key) for key in keys}}
            elif not used(before):
                found = {**found, **{key: wanted.get(key) for key in keys}}
        found, wanted = {**found, "data": before | now}, {**wanted, "data": before | now}
    for key in {**found, **wanted}:
        _check_same(key, found.get(key), wanted.get(key), path)
    return wanted


def _check_same(what: str, found: object, wanted: object, path: Path) -> None:
    if found != wanted:
        raise ValueError(
            f"expected in {str(path)!r} a run with {what} {wanted!r}, got one with {found!r}; choose another --output "
            "or the same settings"
        )


def _read_identity(file: Path) -> dict[str, Any]:
    found = read_object(file)
    if found.get("format") != _FORMAT or not isinstance(found.get("identity"), dict):
        raise ValueError(
            f"expected a run of format {_FORMAT} in {str(file.parent)!r}, got a {RUN_FILE} of another kind (an older "
            "run, or the state of nm-act calibrate); choose another folder"
        )
    identity: dict[str, Any] = found["identity"]
    return identity
