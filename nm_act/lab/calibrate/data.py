"""Windows of calibration text."""

import os
from pathlib import Path
from typing import Any

import torch

from ..texts import find_file, read_text, tokenize

SUFFIXES = (".txt", ".jsonl", ".md")
"""Files that are read from a folder of calibration text."""


def calibration_windows(
    tokenizer: Any, source: str | os.PathLike[str], *, windows: int, length: int, seed: int = 0
) -> torch.Tensor:
    """Windows of token ids, drawn without replacement from a text cut into consecutive windows.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    source : str or os.PathLike
        A UTF-8 text file, a ``.jsonl`` file with "text" fields, a folder of such files (read in order of name), or a
        data folder of ``nm-act eval``, of which C4 is read.
    windows : int
        Number of windows; all of them if the text has fewer.
    length : int
        Tokens per window.
    seed : int
        Seed of the draw.

    Returns
    -------
    Tensor [windows, length], int64

    Raises
    ------
    ValueError
        If the numbers are not positive, the seed is too large, the folder has no text, or the text is shorter than one
        window.
    OSError
        If a file cannot be read.
    """
    check_seed(seed)
    if windows < 1 or length < 2:
        raise ValueError(f"expected at least 1 window of at least 2 tokens, got {windows} of {length}; ask for more")
    return windows_of(tokenizer, read_texts(source), source, windows=windows, length=length, seed=seed)


def windows_of(
    tokenizer: Any, texts: list[str], source: str | os.PathLike[str], *, windows: int, length: int, seed: int
) -> torch.Tensor:
    """`calibration_windows` of the texts of a source."""
    ids = torch.cat([tokenize(tokenizer, text) for text in texts])
    available = ids.numel() // length
    if available == 0:
        raise ValueError(
            f"expected calibration text of at least one window of {length} tokens, got {ids.numel()} tokens in "
            f"{str(source)!r}; give more text or a smaller --length"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:windows]
    return ids[: available * length].view(available, length)[order]


def split_windows(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on, and the last sixteenth, 2 to 32 of them, held out; ValueError if there are fewer than 3."""
    if len(windows) < 3:
        raise ValueError(f"expected at least 3 windows, 2 of them held out, got {len(windows)}; give more text")
    held_out = min(32, max(2, len(windows) // 16))
    return windows[:-held_out], windows[-held_out:]


def check_seed(seed: int) -> None:
    """Raise a ValueError for a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"expected a seed from 0 to 2**63 - 1, got {seed}; choose one of those")


def read_texts(source: str | os.PathLike[str]) -> list[str]:
    """Texts of a source of `calibration_windows`, one per file."""
    source = Path(source)
    files = [source]
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES and path.is_file())
        files = [path for path in files if path.stem.upper() not in ("README", "SOURCES", "LICENSE")]
    try:
        return [read_text(path) for path in files or [find_file(source, "c4")]]
    except FileNotFoundError as error:
        if files:
            raise
        raise ValueError(
            f"expected text files ({', '.join(SUFFIXES)}) or c4 in {str(source)!r}, got neither; name a file or "
            "another folder"
        ) from error
