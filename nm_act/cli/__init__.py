"""The command ``nm-act``. Commands import Transformers only when they need it: ``--help`` waits for torch alone."""

import sys

import typer

from .calibrate import calibrate
from .common import EXIT_INTERRUPTED, INTERRUPTED, reports_errors
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .info import info
from .ppl import ppl
from .search import search

__all__ = ["app", "main"]

app = typer.Typer(
    name="nm-act",
    help="N:M activation sparsity: what it costs in quality, what it gains in speed.",
    epilog="Errors are one sentence with exit code 2; NM_ACT_TRACEBACK=1 shows where they come from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in (info, demo, ppl, generate):
    app.command()(reports_errors(_command))
for _command in (calibrate, search):
    app.command()(reports_errors(_command, resumes=True))
app.command(name="eval")(reports_errors(evaluate, resumes=True))


def main() -> None:
    """Entry point of ``nm-act``: run the command line and exit with its code."""
    try:
        app()
    except KeyboardInterrupt:  # while the command line was still being read
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
