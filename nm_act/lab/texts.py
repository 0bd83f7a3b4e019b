"""Texts and data sets from the user's own files or, without a data folder, from the Hugging Face hub."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..supported import require

DATA_SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
"""File formats that are read: JSON lines, a JSON list, plain text, Parquet."""

SPLITS = ("test", "validation", "val")
"""Splits in order of preference; a file belongs to a split if its name contains the split's name."""

HUB_TEXTS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
"""Name of a text -> path, configuration and split on the hub."""


def find_file(folder: str | Path, name: str) -> Path:
    """The file of a data set in a folder: ``NAME.SUFFIX``, ``*/NAME.SUFFIX`` or ``NAME/*.SUFFIX``, in this order.

    Suffixes are .jsonl, .json, .txt and .parquet. Of several splits, the test split is taken, else the validation
    split. Raises FileNotFoundError if the folder does not exist or has no such file, ValueError if several files fit
    and none of them names its split.
    """
    return find_splits(folder, name)[0]


def find_splits(folder: str | Path, name: str) -> list[Path]:
    """Files of a data set's splits in a folder, the one that `find_file` takes first."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a data folder, but there is none at {str(folder)!r}; check --data")
    for pattern in (f"{name}.*", f"*/{name}.*", f"{name}/*.*"):
        files = sorted(path for path in folder.glob(pattern) if path.suffix in DATA_SUFFIXES)
        splits = [fits for split in SPLITS if (fits := [f for f in files if split in f.stem.lower()])] or [files]
        chosen = splits[0]
        if len(chosen) == 1:
            return list(dict.fromkeys(fits[0] for fits in splits if len(fits) == 1))
        if chosen:
            names = ", ".join(str(path.relative_to(folder)) for path in chosen[:4])
            raise ValueError(
                f"expected one file for {name} in {str(folder)!r}, got {names}; keep one, or name its split"
            )
    raise FileNotFoundError(
        f"no data for {name} in {str(folder)!r}: expected {name}.jsonl, */{name}.jsonl or {name}/*.jsonl; "
        "add it, leave the task out, or leave out --data to read it from the hub"
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json or .parquet file; ValueError if there are none or one is not an object."""
    rows: list[Any] = [row for _, row, _ in _rows(path)]
    broken = next((row for row in rows if isinstance(row, ValueError)), None)
    if broken is not None:
        raise ValueError(f"expected JSON in {str(path)!r}, got invalid text ({broken}); repair the file") from broken
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"expected a list of objects in {str(path)!r}, got something else; write one JSON object per line"
        )
    return rows


def load_text(name: str, folder: str | Path | None = None) -> tuple[str, str]:
    """Text and source of "wikitext2" or "c4", from a data folder or the hub; rows are joined by blank lines.

    Raises OSError if there is no such file or the hub cannot be read, ImportError if the package datasets is missing.
    """
    if folder is not None:
        path = find_file(folder, name)
        return read_text(path), path.name
    datasets = require("datasets", "eval", "reading the hub")
    place, configuration, split = HUB_TEXTS[name]
    try:
        rows = datasets.load_dataset(place, configuration, split=split, streaming=name == "c4")
        rows = rows.take(2000) if name == "c4" else rows  # the whole of C4 is terabytes
        return "\n\n".join(row["text"] for row in rows), place
    except Exception as error:  # the hub client raises its own, the network others
        first = " ".join(str(error).split())[:160]
        raise OSError(f"cannot read {name} from the hub ({first}); name a folder with --data") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """Text of a UTF-8 file; of a .jsonl, .json or .parquet file, the rows' "text" fields joined by blank lines.

    A byte order mark is not part of the text. Raises OSError if the file cannot be read, ValueError if it is empty, not
    UTF-8, or a row is not an object with a text in "text".
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"expected a text file, but {str(path)!r} is a folder; name a file inside it")
    if path.suffix in (".jsonl", ".json", ".parquet"):
        text = "\n\n".join(_field(path, *row) for row in _rows(path))
    else:
        text = _decoded(path)
    if not text.strip():
        raise ValueError(f"expected text in {str(path)!r}, but there is none; name a file with text")
    return text


def tokenize(tokenizer: Any, text: str, max_tokens: int | None = None) -> torch.Tensor:
    """Token ids of a text, int64 ``[tokens]``, or only the first `max_tokens`, at least 2 (else ValueError).

    Special tokens are up to the tokenizer: a beginning-of-sequence token is at the start of the text, not of every
    window.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"expected at least 2 tokens to evaluate on, got {max_tokens}; ask for more")
    # verbose=False: the warning about texts longer than the context does not apply to windows.
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def whole_windows(tokenizer: Any, text: str, window: int, max_tokens: int | None = None) -> torch.Tensor:
    """Token ids of a text's whole windows, int64 ``[tokens]``; ValueError if there is none."""
    ids = tokenize(tokenizer, text, max_tokens)
    if ids.numel() < window:
        raise ValueError(
            f"expected a text of at least one window of {window} tokens, got {ids.numel()}; use --window"
            + ("" if max_tokens is None else " or more --max-tokens")
        )
    return ids[: ids.numel() // window * window]


def first_windows(tokenizer: Any, text: str, windows: int, window: int) -> torch.Tensor:
    """The first windows of a text, int64 ``[windows, window]``; ValueError if it has fewer."""
    # A token is a few characters: a text much longer than that need not be tokenised to its end.
    ids = tokenize(tokenizer, text[: 32 * windows * window], windows * window)
    if ids.numel() < windows * window:
        raise ValueError(
            f"expected calibration text of {windows} windows of {window} tokens, got {ids.numel()} tokens; "
            "give a longer text, or fewer or shorter windows"
        )
    return ids.view(windows, window)


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8 text in {str(path)!r}, another encoding at byte {error.start}; convert it"
        ) from error
    except OSError as error:
        raise type(error)(f"cannot read {str(path)!r}: {(error.strerror or str(error)).lower()}") from error


def _rows(path: Path) -> Iterator[tuple[str, object, str]]:
    """Place, value and text of every row of a JSON-lines, .json or .parquet file; the value may be a ValueError."""
    if path.suffix == ".parquet":
        values = require("datasets", "eval", "reading Parquet").Dataset.from_parquet(str(path)).to_list()
    elif path.suffix == ".json":
        value = _json(_decoded(path))
        values = value if isinstance(value, list) else [value]
    else:
        # Not splitlines(): U+2028 may stand unescaped inside a JSON string.
        lines = enumerate(_decoded(path).split("\n"), 1)
        yield from ((f"line {number}", _json(line), line) for number, line in lines if line.strip())
        return
    yield from ((f"row {number}", value, str(value)) for number, value in enumerate(values, 1))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        return error


def _field(path: Path, place: str, row: object, shown: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(
            f'expected an object with a "text" field on {place} of {str(path)!r}, got {shown[:40]!r}; '
            "fix the row or give a plain text file"
        )
    return text
