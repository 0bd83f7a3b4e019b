"""Measurements in a JSON-lines file, so that a stopped search does not repeat them."""

import json
from pathlib import Path
from typing import Any

from ...files import read_json_lines, write_json_lines


class ResultLines:
    """Rows of a JSON-lines file by the fields `key`, of which the last one may be missing (None).

    The file need not exist. Raises ValueError if a line lacks one of the other fields or of the `values`.
    """

    def __init__(self, path: Path, key: tuple[str, ...], values: tuple[str, ...]):
        self._path, self._key = path, key
        self._rows: dict[str, dict[str, Any]] = {}
        for row in read_json_lines(path, (*key[:-1], *values)):
            self.add(**row)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return json.dumps(key) in self._rows

    def __getitem__(self, key: tuple[Any, ...]) -> dict[str, Any]:
        return self._rows[json.dumps(key)]

    def add(self, **row: Any) -> None:
        """Add a row, or replace the one with its key; `write` stores it."""
        row = {name: value for name, value in row.items() if value is not None}
        self._rows[json.dumps([row.get(name) for name in self._key])] = row

    def write(self) -> None:
        """Write all rows, whole or not at all."""
        write_json_lines(self._path, self._rows.values())
