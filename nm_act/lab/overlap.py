"""Detects that a model is evaluated on text that it was calibrated on, by hashes of short runs of tokens.

Every run of `WINDOW` tokens has a hash; the hashes divisible by `SAMPLED` are a text's fingerprints, wherever its
windows were cut. A calibration stores the fingerprints of its text, and an evaluation looks for them in its own text.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from .output import read_object

WINDOW = 16
SAMPLED = 32
LARGEST_SHARE = 0.01
"""Share of an evaluation's fingerprints that may occur in the calibration: phrases that many texts contain."""

KEY = "text_hashes"
"""Field of a calibration's or a search's facts."""


def fingerprints(tokens: torch.Tensor) -> list[str]:
    """Sampled hashes of the runs of `WINDOW` tokens in ``tokens [tokens]``, or in each row of ``[windows, length]``.

    Examples
    --------
    >>> ids = torch.arange(4000)
    >>> set(fingerprints(ids[1000:2000])) <= set(fingerprints(ids))
    True
    """
    rows = tokens.cpu().numpy().astype(np.uint64).reshape(-1, tokens.shape[-1])
    runs = rows.shape[1] - WINDOW + 1
    if runs < 1:
        return []
    hashes = np.zeros((len(rows), runs), dtype=np.uint64)
    for offset in range(WINDOW):  # unsigned products wrap
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + rows[:, offset : offset + runs] + np.uint64(1)
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    chosen = np.unique(hashes[hashes % np.uint64(SAMPLED) == 0] >> np.uint64(16))
    return [f"{value:012x}" for value in chosen.tolist()]


def known_fingerprints(*files: Path) -> list[str]:
    """The fingerprints in the facts of calibrations and searches; missing files, and files without any, are skipped."""
    return [each for file in files if file.is_file() for each in read_object(file).get(KEY, ())]


def check_apart(tokens: torch.Tensor, known: Iterable[str], what: str) -> None:
    """Raise a ValueError if a text to evaluate on overlaps one with these fingerprints, which `what` was made on."""
    own, known = set(fingerprints(tokens)), set(known)
    share = len(own & known) / len(own) if own else 0.0
    if share > LARGEST_SHARE:
        raise ValueError(
            f"expected text to evaluate on that {what} was not calibrated on, got one of which {share:.0%} is in that "
            "text; calibrate on another text, or evaluate on another"
        )
