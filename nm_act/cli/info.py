"""``nm-act info``: how this installation was built, what it runs on, what it supports."""

import dataclasses
from typing import Any

from . import common
from . import options as opt

_LABELS = {
    "version": "nm_act",
    "torch": "built against torch",
    "torch_cuda": "CUDA of that torch",
    "compiler": "compiler",
    "cpu_isa": "CPU instructions in use",
    "cpu_isas": "CPU instructions compiled",
    "cuda": "CUDA kernels compiled",
    "cuda_archs": "CUDA architectures",
    "cutlass": "CUTLASS",
    "why_no_cuda": "why no CUDA kernels",
}


def info(as_json: opt.AsJson = False) -> None:
    """Show the build, the devices and the table of supported operators."""
    from ..ops import build_info, support_table
    from ..supported import supported

    build, support, versions = build_info(), support_table(), supported()
    devices = _devices()
    if as_json:
        tested = [dataclasses.asdict(each) | {"tested": each.tested} for each in versions]
        common.print_json({"build": build, "versions": tested, "devices": devices, "support": support})
        return
    rows = [[_LABELS.get(key, key), _text(value)] for key, value in build.items() if value not in (None, [], ())]
    common.print_table("Build", ["", ""], rows, numbers=False)
    rows = [[each.package, each.versions, each.installed or "–", _judged(each)] for each in versions]
    common.print_table("Versions", ["package", "tested", "installed", ""], rows, numbers=False)
    rows = [[device["device"], device["name"], _text(device["detail"])] for device in devices]
    common.print_table("Devices", ["device", "name", "detail"], rows, numbers=False)
    columns = [key for key in (support[0] if support else ()) if key != "device"]
    for device in dict.fromkeys(row["device"] for row in support):
        rows = [[_text(row.get(key)) for key in columns] for row in support if row["device"] == device]
        common.print_table(f"Supported on {_text(device)}", columns, rows, numbers=False)


def _judged(each: Any) -> str:
    return "" if each.installed is None or each.tested else "untested"


def _devices() -> list[dict[str, Any]]:
    import torch

    found = [{"device": "cpu", "name": common.cpu_name(), "detail": f"{common.usable_cores()} cores"}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"sm{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        found.append({"device": f"cuda:{index}", "name": properties.name, "detail": detail})
    return found


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple, set)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
