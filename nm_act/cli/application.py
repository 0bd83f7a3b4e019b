"""The application behind ``nm-act``. Commands import torch and Transformers when they run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..version import __version__
from .calibrate import calibrate
from .common import EXIT_BAD_INPUT, INTERRUPTED, exit_interrupted, reports_errors
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .info import info
from .ppl import ppl
from .run import run
from .search import search


@contextmanager
def _interrupts_told() -> Iterator[None]:
    """Report a Ctrl-C that came before the command itself started; Typer would print nothing."""
    try:
        yield
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise exit_interrupted() from None


class _OneSentence(TyperGroup):
    """Makes usage errors one sentence, like all other errors of the command line."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _interrupts_told():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _interrupts_told():
            return super().invoke(ctx)

    def main(  # type: ignore[override]
        self, args: Any = None, prog_name: Any = None, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except Exception as error:
            # Typer has its own copy of click, older versions use the package: their usage errors share no public class.
            if not hasattr(error, "format_message") or os.environ.get("NM_ACT_TRACEBACK"):
                raise
            print(f"nm-act: {_usage_sentence(error)}", file=sys.stderr)
            code = EXIT_BAD_INPUT
        sys.exit(code if isinstance(code, int) else 0)


def _usage_sentence(error: Any) -> str:
    text = " ".join(error.format_message().split()).rstrip(".")
    wanted = text.partition("Input should be ")[2].partition(", unable")[0]
    if wanted:  # of pydantic, which newer versions of Typer ask
        got = "".join(f", got {each['input']!r}" for each in error.__cause__.errors()[:1])
        text = f"expected {error.param.opts[0]} to be {wanted}{got}"
    context = getattr(error, "ctx", None)
    command = "nm-act" if context is None or context.parent is None else f"nm-act {context.info_name}"
    return f"{text[:1].lower()}{text[1:]}; {command} --help lists what it takes"


app = typer.Typer(
    name="nm-act",
    cls=_OneSentence,
    help="N:M activation sparsity: what it costs in quality, what it gains in speed.",
    epilog="Errors are one sentence with exit code 2; NM_ACT_TRACEBACK=1 shows where they come from.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nm-act {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for _command in (info, demo, ppl, generate, convert):
    app.command()(reports_errors(_command))
app.command()(reports_errors(calibrate, unfinished="state/block-*.safetensors"))
app.command()(reports_errors(search, unfinished="*.jsonl"))
app.command(name="eval")(reports_errors(evaluate, unfinished="rows/*.json"))
app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
)(run)
