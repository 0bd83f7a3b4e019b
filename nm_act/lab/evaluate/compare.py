"""Perplexity of several variants of a model on one text, each against the dense model."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ...conversion.sparsify import SparsifyReport
from .perplexity import check_finite, perplexity


def compare(
    reports: Iterable[tuple[str, SparsifyReport]],
    tokens: torch.Tensor,
    window: int | None = None,
    *,
    note: Callable[[str], None],
    bar: Callable[[str], AbstractContextManager[Any]],
) -> list[dict[str, Any]]:
    """Perplexity of every model as a row of plain data, with its change against the dense model's in per cent.

    `reports` are names and models, the dense one first; an iterator may create each model on demand, because none is
    kept. `note` is called with a line before a measurement, `bar` with a label for a context that yields
    ``update(done, total, detail)``. Raises RuntimeError if the dense model's perplexity is not finite.
    """
    rows: list[dict[str, Any]] = []
    for name, report in reports:
        label = f"perplexity, {name}"
        note(label)
        start = time.perf_counter()
        with bar(label) as update:
            found = perplexity(
                report.model, tokens, window=window, progress=lambda *step, u=update: u(*step[:2], f"{step[2]:.2f}")
            )
        dense = rows[0]["perplexity"] if rows else found.value
        check_finite(dense)
        rows.append(
            {
                "name": name,
                "perplexity": found.value,
                "change_percent": 100 * (found.value / dense - 1) if rows else None,
                "tokens": found.tokens,
                "windows": found.windows,
                "window": found.window,
                "mac_fraction": report.mac_fraction,
                "seconds": time.perf_counter() - start,
                "recipe": None if report.recipe is None else report.recipe.to_dict(),
            }
        )
        del report  # before the next one is made: weights of one sparse copy at a time
    return rows
