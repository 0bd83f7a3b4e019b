"""Data sets from a folder of the user's own files; where there is none, from the Hugging Face hub."""

import json
from pathlib import Path

from .perplexity import read_text

__all__ = ["HUB_TEXTS", "find_file", "load_text", "read_rows"]

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
"""File formats that are read: JSON lines, a JSON list, plain text, Parquet."""

SPLITS = ("test", "validation", "val")
"""Where a folder holds several splits, the first of these that occurs in a file's name is taken."""

HUB_TEXTS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
"""Name of a text -> path, configuration and split on the hub."""


def find_file(folder: str | Path, name: str) -> Path:
    """The file of a data set in a folder.

    Looked for, in this order: ``NAME.SUFFIX``, ``*/NAME.SUFFIX``, ``NAME/*.SUFFIX``, with the suffixes .jsonl,
    .json, .txt and .parquet. Of several splits the test split is taken, else the validation split.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist or has no such file.
    ValueError
        If several files fit and none of them names its split.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a data folder, but there is none at {str(folder)!r}; check --data")
    for pattern in (f"{name}.*", f"*/{name}.*", f"{name}/*.*"):
        files = sorted(path for path in folder.glob(pattern) if path.suffix in SUFFIXES)
        chosen = next((fits for split in SPLITS if (fits := [f for f in files if split in f.stem.lower()])), files)
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            names = ", ".join(str(path.relative_to(folder)) for path in chosen[:4])
            raise ValueError(
                f"expected one file for {name} in {str(folder)!r}, got {names}; keep one, or name its split"
            )
    raise FileNotFoundError(
        f"no data for {name} in {str(folder)!r}: expected {name}.jsonl, */{name}.jsonl or {name}/*.jsonl; "
        "add it, leave the task out, or leave out --data to read it from the hub"
    )


def read_rows(path: Path) -> list[dict]:
    """Rows of a .jsonl, .json or .parquet file; ValueError if there are none or one is not an object."""
    if path.suffix == ".parquet":
        from datasets import Dataset

        rows = Dataset.from_parquet(str(path)).to_list()
    else:
        text = read_text_file(path)
        try:
            # Not splitlines(): U+2028 may stand unescaped inside a JSON string.
            rows = (
                json.loads(text) if path.suffix == ".json" else [json.loads(r) for r in text.split("\n") if r.strip()]
            )
        except ValueError as error:
            raise ValueError(f"expected JSON in {str(path)!r}, got invalid text ({error}); repair the file") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"expected a list of objects in {str(path)!r}, got something else; one JSON object a line")
    return rows


def read_text_file(path: Path) -> str:
    """A file as UTF-8 text, with the errors of `read_text`."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text in {str(path)!r}, another encoding at byte {error.start}") from error


def load_text(name: str, folder: str | Path | None = None) -> tuple[str, str]:
    """A text for perplexity or calibration and where it is from; rows are joined by a blank line.

    Parameters
    ----------
    name : str
        "wikitext2" or "c4".
    folder : str or Path, optional
        Folder to take it from; without one it comes from the hub.

    Raises
    ------
    OSError
        If there is no such file, or the hub cannot be read.
    ImportError
        If the hub is needed and the package datasets is not installed.
    """
    if folder is not None:
        path = find_file(folder, name)
        if path.suffix in (".txt", ".jsonl"):
            return read_text(path), path.name
        return "\n\n".join(str(row["text"]) for row in read_rows(path)), path.name
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading the hub needs the package datasets; run `pip install nm_act[eval]`") from error
    place, configuration, split = HUB_TEXTS[name]
    try:
        rows = datasets.load_dataset(place, configuration, split=split, streaming=name == "c4")
        rows = rows.take(2000) if name == "c4" else rows  # the whole of C4 is terabytes
        return "\n\n".join(row["text"] for row in rows), place
    except Exception as error:  # the hub client raises its own, the network others
        first = " ".join(str(error).split())[:160]
        raise OSError(f"cannot read {name} from the hub ({first}); name a folder with --data") from error
