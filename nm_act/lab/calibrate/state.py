"""An unfinished calibration on disk: the identity of its run, and every finished block."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ...files import write_atomic
from ...layers.linear import NMLinear
from ..output import RUN_FILE, read_object, write_json

_FACTS = "facts"


class RunState:
    """Finished blocks of one run on disk, in a folder that is created if necessary; None stores nothing.

    `identity` holds everything that determines the result, in the form that JSON reads back; its "settings" are a dict.
    Raises ValueError if the folder has finished blocks of another run, or its ``run.json`` is damaged.
    """

    def __init__(self, folder: str | Path | None, identity: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN_FILE
        known = read_object(path) if path.is_file() else identity
        if not known:
            raise ValueError(
                f"expected in {str(path)!r} what the unfinished run was started with, got a damaged file; remove its "
                "folder or choose another output"
            )
        if known != identity and any(self.folder.glob("block-*.safetensors")):
            raise ValueError(
                f"expected the unfinished run in {str(self.folder)!r} to be this one, got another "
                f"{_difference(known, identity)}; finish that run, remove the folder or choose another output"
            )
        write_json(path, identity)

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{index:04d}.safetensors"

    def load(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Data of a finished block and the facts about it; None if it is not finished, or its file is damaged."""
        if self.folder is None or not self._path(index).is_file():
            return None
        try:
            with safe_open(self._path(index), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a dict)
        except SafetensorError:
            return None

    def save(self, index: int, layers: dict[str, NMLinear], facts: dict[str, Any]) -> None:
        """Keep the data of a finished block, and facts about it that JSON can hold."""
        if self.folder is not None:
            data = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.data().items()}
            tensors = {name: value.detach().cpu().contiguous() for name, value in data.items()}
            write_atomic(self._path(index), save(tensors, {_FACTS: json.dumps(facts)}))


def _difference(known: dict[str, Any], identity: dict[str, Any]) -> str:
    """Name of the first field that differs, with both values if it is a setting."""
    key = next((key for key, value in identity.items() if known.get(key) != value), "version")
    before, now = known.get(key), identity.get(key)
    if key == "settings" and isinstance(before, dict) and isinstance(now, dict):
        name = next((name for name in now if before.get(name) != now[name]), None)
        return key if name is None else f"{name} ({before.get(name)} then, {now[name]} now)"
    return key
