"""Calibrations as rows of a study or options of a search: found by the variant's name, identified by their digest."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from ...conversion.calibration import DATA_FILE, FACTS_FILE, read_calibration
from ..output import read_object
from .variants import Variant, from_recipe

_TRAINING = ("data", "windows", "length", "learning_rate", "epochs", "loss")


def of_calibration(folder: Path) -> Variant:
    """Variant of a folder that nm-act calibrate wrote."""
    recipe, _, _ = read_calibration(folder)
    facts = _facts(folder / FACTS_FILE)
    return from_recipe(
        recipe,
        folder.resolve().name,
        calibrated=True,
        seed=int(facts.get("seed", 0)),
        calibration=hashlib.sha256((folder / DATA_FILE).read_bytes()).hexdigest(),
        calibrated_on=_text_and_training(facts) if "windows" in facts else "",
        folder=folder,
    )


def _facts(file: Path) -> dict[str, Any]:
    """Facts that nm-act calibrate and search write beside a calibration; none if a program saved it."""
    if not file.is_file():
        return {}
    facts = read_object(file)
    needed = ("seed", *_TRAINING) if "windows" in facts else ("seed",)
    lacking = next((key for key in needed if key not in facts), None)
    if lacking is not None:
        raise ValueError(f"expected {lacking} of a calibration in {str(file)!r}, got none; calibrate again")
    return facts


def _text_and_training(facts: dict[str, Any]) -> str:
    return (
        f"{facts['data']}, {facts['windows']} windows of {facts['length']} tokens; what is learned: learning rate "
        f"{facts['learning_rate']:g}, {facts['epochs']:g} epochs, {facts['loss']}"
    )


def calibrated_row(variant: Variant, calibrated: Path | None) -> Variant:
    """A calibrated variant with its calibration, from the folder named by its slug in the folder `calibrated`.

    Raises FileNotFoundError if there is none, ValueError if it is of another recipe or seed.
    """
    folder = None if calibrated is None else calibrated / variant.slug
    if folder is None or not (folder / DATA_FILE).is_file():
        where = "--calibrated" if folder is None else repr(str(folder))
        raise FileNotFoundError(
            f"expected a calibration for {variant.name!r} in {where}, got none; "
            f"make it with nm-act calibrate --output .../{variant.slug}"
        )
    found = of_calibration(folder)
    if found.recipe != variant.recipe:
        raise ValueError(
            f"expected in {str(folder)!r} a calibration of the recipe of {variant.name!r}, got another; calibrate again"
        )
    if variant.seed not in (0, found.seed):
        raise ValueError(
            f"expected in {str(folder)!r} a calibration with the seed {variant.seed} of {variant.name!r}, got "
            f"{found.seed}; calibrate again or name that seed"
        )
    own = {name: getattr(variant, name) for name in ("name", "method", "pattern", "layers", "calibrated")}
    return dataclasses.replace(found, **own)
