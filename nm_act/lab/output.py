"""Output folders, and results as JSON (and back), CSV, Markdown and PNG."""

import csv
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import write_atomic
from ..supported import require

RUN_FILE = "run.json"
"""File with the identity of a run, in its folder."""


def make_folder(folder: Path, shown: Path, option: str) -> None:
    """Make a folder with its parents; the OSError names `shown` and the option to change."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in the way" if in_the_way else (error.strerror or str(error)).lower()
        raise type(error)(f"cannot make the folder {str(shown)!r}: {reason}; choose another {option}") from error


def check_output(path: Path, run_file: str = RUN_FILE, part: str = "rows") -> None:
    """Raise a ValueError if a folder holds files, but no `run_file`; an empty folder `part` in it is allowed."""
    if path.is_dir() and not (path / run_file).is_file():
        other = next((each.name for each in sorted(path.iterdir()) if each.name != part), part)
        if other != part or any((path / part).glob("*")):
            raise ValueError(
                f"expected a new folder or that of an earlier run, got {str(path)!r} with {other} and without "
                f"{run_file}; choose another --output"
            )


def to_json(data: dict[str, Any]) -> str:
    """Indented JSON that any reader accepts: infinities and NaN, which JSON lacks, become null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `to_json` of the data, whole or not at all."""
    write_atomic(path, to_json(data) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no UTF-8
        return {}
    return found if isinstance(found, dict) else {}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def to_csv(rows: list[dict[str, Any]], columns: Iterable[str] | None = None) -> str:
    """CSV of some fields of the rows, by default all; None and NaN are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns or rows[0]), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if is_undefined(value) else value for key, value in row.items()})
    return text.getvalue()


def is_undefined(value: object) -> bool:
    """Whether a value is None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def markdown_table(header: list[str], lines: list[list[str]], right: int = 1) -> str:
    """A Markdown table; columns from index `right` on are right-aligned."""
    rule = ["---:" if index >= right else "---" for index in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that many inches."""
    figures = require("matplotlib.figure", "demo", "the plot")
    return figures.Figure(figsize=(width, height), layout="constrained")


def png(figure: Any) -> bytes:
    """A figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
