"""``nm-act run``: any Python program, with nm_act's checkpoints known to Transformers in it."""

import os
import runpy
import signal
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer


def run(
    context: typer.Context,
    program: Annotated[str, typer.Argument(help="A script, -m MODULE, or a command that a Python package installed.")],
) -> None:
    """Start a Python program in which nm_act checkpoints load sparse: nm-act run lm_eval --model hf ..."""
    import nm_act  # noqa: F401 (registers)

    # The program handles Ctrl-C and SIGTERM as if it had been started directly.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.unraisablehook = sys.__unraisablehook__
    try:
        _start(program, context.args)
    except KeyboardInterrupt:
        sys.exit(130)


def _start(program: str, arguments: list[str]) -> None:
    if program == "-m":
        if not arguments:
            raise typer.BadParameter("expected a module after -m, got none")
        sys.argv = arguments
        sys.path.insert(0, os.getcwd())
        try:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        except ImportError as error:
            if not _is_of_runpy(error):
                raise
            sys.exit(f"nm-act: {error}")
        return
    sys.argv = [program, *arguments]
    if Path(program).is_file():
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")
        return
    found = [*metadata.entry_points(group="console_scripts", name=program)]
    if not found:
        raise typer.BadParameter(
            f"expected a Python script, -m MODULE or a command that a Python package installed, got {program!r}"
        )
    sys.exit(found[0].load()())


def _is_of_runpy(error: ImportError) -> bool:
    """Whether runpy found no module to start, as opposed to an error of the program."""
    trace = error.__traceback__
    names = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(trace)]
    return set(names) == {__name__, "runpy"}
