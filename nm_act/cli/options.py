"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from .common import reports_errors

MAX_THREADS = 1024
"""Largest number of threads: no machine gains from more, and OpenMP ends the process if it cannot start them."""

DEFAULT_PATTERNS = ("2:4", "4:8", "8:16", "16:32")


@reports_errors  # Typer calls it before the command itself
def existing_recipe(value: Path | list[Path] | None) -> Path | list[Path] | None:
    """Refuse a value that is neither an existing file nor the name of a recommended recipe."""
    from ..recipe import NAMED

    for path in value if isinstance(value, list) else [value]:
        if path is not None and str(path) not in NAMED and not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise typer.BadParameter(f"file {str(path)!r} {what}, nor is it one of {', '.join(NAMED)}.")
    return value


_RECIPE = typer.Option(
    "--recipe",
    callback=existing_recipe,
    help="Recipe: prefill, decode, balanced or a file (.yaml, .yml, .json); --pattern, --criterion and --mitigation "
    "replace its own, if its rules set none.",
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or hub id of the model.", show_default=False)
]
Patterns = Annotated[
    list[str] | None, typer.Option("--pattern", metavar="N:M", help="Pattern, e.g. 8:16 or 2:4+1; repeatable.")
]
Recipe = Annotated[Path | None, _RECIPE]
Recipes = Annotated[list[Path] | None, _RECIPE]
Criterion = Annotated[
    str | None, typer.Option("--criterion", help="How activations are scored, e.g. act, wina, amber.")
]
Mitigations = Annotated[list[str] | None, typer.Option("--mitigation", help="Error mitigation, e.g. var; repeatable.")]
Calibrations = Annotated[
    list[Path] | None, typer.Option("--calibration", help="Folder written by nm-act calibrate; repeatable.")
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder with the data; the hub without it.")]
Window = Annotated[
    int | None, typer.Option("--window", min=2, help="Tokens per window; 2048 or the model's context by default.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=2, help="Read only that many tokens of the text.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="Where the model runs, e.g. cpu or cuda.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=MAX_THREADS, help="CPU threads; torch's choice by default.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
