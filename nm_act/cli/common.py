"""Shared by the commands: errors as sentences, progress on stderr, loading, and facts about the machine."""

import functools
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from ..lab.output import to_json

EXIT_BAD_INPUT = 2
LINE_SECONDS = 60
"""Interval of progress lines if there is no terminal for a bar."""
INTERRUPTED = "interrupted; no result was written"
INTERRUPTED_BUT_KEPT = "interrupted; run the same command to go on"


_interrupts: list[int] = []


def remember_interrupts() -> None:
    """Record every Ctrl-C, and treat SIGTERM as one, for `note` and `reports_errors`.

    During an import, a library may mistake a KeyboardInterrupt for a missing requirement, and in clean-up callbacks
    Python itself drops it with a traceback.
    """
    process = os.getpid()

    def interrupt(number: int, frame: Any) -> None:
        if number == signal.SIGTERM and os.getpid() != process:  # a forked worker, ended by its pool
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:

        def unraisable(dropped: Any) -> None:
            if not issubclass(dropped.exc_type, KeyboardInterrupt):
                sys.__unraisablehook__(dropped)

        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = unraisable


def exit_interrupted() -> typer.Exit:
    """The exit of an interrupted command, with the code that shells give: 143 after SIGTERM, 130 after Ctrl-C."""
    return typer.Exit(128 + (_interrupts[0] if _interrupts else signal.SIGINT))


def reports_errors(command: Callable[..., Any], *, unfinished: str | None = None) -> Callable[..., Any]:
    """Turn a command's errors into one sentence on stderr and exit code 2, and Ctrl-C into `exit_interrupted`.

    If the command can continue a stopped run, `unfinished` is a glob pattern of the finished parts that the run leaves
    in its ``output``. With the environment variable NM_ACT_TRACEBACK=1, exceptions pass through.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        def interrupted() -> typer.Exit:
            kept = unfinished is not None and any(kwargs["output"].glob(unfinished))
            print(INTERRUPTED_BUT_KEPT if kept else INTERRUPTED, file=sys.stderr)
            return exit_interrupted()

        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise interrupted() from None
        except BrokenPipeError:  # the reader of our output went away, as in `nm-act info | head`: typer exits quietly
            raise
        except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
            if isinstance(error, typer.Exit) or os.environ.get("NM_ACT_TRACEBACK"):
                raise
            if _interrupts:
                raise interrupted() from None
            print(f"nm-act: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            raise typer.Exit(EXIT_BAD_INPUT) from None

    return wrapper


def note(text: str) -> None:
    """Print a line on stderr, separate from ``--json``; raises a KeyboardInterrupt that a library has swallowed."""
    if _interrupts:
        raise KeyboardInterrupt
    print(text, file=sys.stderr, flush=True)


def print_json(data: dict[str, Any]) -> None:
    """The machine output: one JSON document on stdout."""
    print(to_json(data))


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[..., None]]:
    """Progress bar on stderr (occasional lines without a terminal); yields ``update(done, total, detail="")``."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None, detail="")
        last = time.monotonic()

        def update(done: int, total: int, detail: str = "") -> None:
            nonlocal last
            bar.update(task, completed=done, total=total, detail=detail)
            if not console.is_terminal and time.monotonic() - last > LINE_SECONDS:
                last = time.monotonic()
                note(f"{label}: {done}/{total} {detail}".rstrip())

        yield update


def print_table(
    title: str, columns: list[str], rows: list[list[str]], *, caption: str | None = None, numbers: bool = True
) -> None:
    """Table on stdout; with `numbers`, all columns but the first are right-aligned. A header of empty cells is dropped.

    Cells wrap at spaces to fit the width. If single words are too long for that, the cells of the first column, which
    name the rows, are replaced by numbers, which are explained below the table.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    shown = [list(map(str, row)) for row in rows]
    between = 3 * (len(columns) - 1)
    widths = _column_widths(columns, shown, console.width - between)
    names = []
    if numbers and sum(widths) > console.width - between:
        names = [row[0] for row in shown]
        shown = [[f"[{index}]", *row[1:]] for index, row in enumerate(shown, 1)]
        widths = _column_widths(columns, shown, console.width - between)
    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        show_header=any(columns),
        title_justify="left",
        caption_justify="left",
    )
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(column, justify="right" if numbers and index > 0 else "left", overflow="fold", width=width)
    for row in shown:
        table.add_row(*row)
    Console(markup=False, highlight=False, width=max(console.width, sum(widths) + between)).print(table)
    for index, name in enumerate(names, 1):
        print(f"[{index}] {name}")
    print()


def _column_widths(columns: list[str], rows: list[list[str]], total: int) -> list[int]:
    """Widths with a sum of at most `total`, if possible: the widest are narrowed, but none below its longest word."""
    cells = [[column, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    widths = [max(map(len, each), default=0) for each in cells]
    least = [max((len(word) for cell in each for word in cell.split()), default=0) for each in cells]
    while sum(widths) > total:
        widest = max(range(len(widths)), key=lambda index: (widths[index] > least[index], widths[index]))
        if widths[widest] == least[widest]:
            break
        widths[widest] -= 1
    return widths


def format_quality(row: dict[str, Any]) -> list[str]:
    """Perplexity and its change against dense, as table cells."""
    change = "" if row["change_percent"] is None else f"{row['change_percent']:+.1f} %"
    return [f"{row['perplexity']:.2f}", change]


def load(
    source: str, dtype: str = "auto", device: str = "cpu", *, config: Any = None, tokenizer: Any = None
) -> tuple[Any, Any]:
    """`nm_act.integrations.checkpoints.load_model` without Transformers' own messages and progress bars."""
    from ..integrations.checkpoints import check_device, check_dtype, load_model

    check_dtype(dtype)
    check_device(device)
    _quiet()
    note(f"loading {source}")
    return load_model(source, dtype=dtype, device=device, config=config, tokenizer=tokenizer)


def load_config(source: str) -> Any:
    """`nm_act.integrations.checkpoints.load_config` without Transformers' own messages."""
    from ..integrations import checkpoints

    _quiet()
    return checkpoints.load_config(source)


def _quiet() -> None:
    from transformers.utils import logging

    transformers_log: Any = logging  # without annotations
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()


def load_dense(source: str, dtype: str = "auto", device: str = "cpu", window: int | None = None) -> tuple[Any, Any]:
    """`load` a dense model, after checking in its configuration that its context holds the window."""
    from ..lab.evaluate.perplexity import check_window

    config = load_config(source)
    check_window(config, window)
    check_not_sparse(config, source, " to compare with")
    return load(source, dtype, device, config=config)


def check_not_sparse(config: Any, source: str, purpose: str = "") -> None:
    """Raise a ValueError, before the weights are loaded, if a model's configuration is that of a sparse checkpoint."""
    from ..integrations.transformers import QUANT_METHOD, quantisation_of

    if quantisation_of(config) == QUANT_METHOD:
        raise ValueError(
            f"expected a dense model{purpose}, but {source!r} is a sparse checkpoint; name the checkpoint it was made "
            "from"
        )


def set_threads(threads: int | None) -> None:
    """Set torch's thread count; None leaves it."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def environment() -> dict[str, Any]:
    """Versions and machine, for the record beside a measurement."""
    import torch
    import transformers

    from ..ops import build_info

    build = build_info()
    return {
        "nm_act": build.get("version"),
        "cpu_isa": build.get("cpu_isa"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's marketing name if the system gives it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def model_name(source: str | os.PathLike[str]) -> str:
    """Short name for a table: the last part of a path or hub id."""
    return Path(source).name or str(source)
