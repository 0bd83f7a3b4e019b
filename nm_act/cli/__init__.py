"""The command ``nm-act``. `main` imports the rest, so that Ctrl-C is handled during imports, too."""


def main() -> None:
    """Entry point of ``nm-act``: run the command line and exit with its code."""
    import sys

    try:
        from ..supported import require

        try:
            require("typer", "cli")
            require("rich", "cli")
        except ModuleNotFoundError as error:
            sys.exit(f"nm-act: {error}")
        from .application import app
        from .common import remember_interrupts

        remember_interrupts()
        app()
    except KeyboardInterrupt:  # while the command line was still being read
        print("interrupted; no result was written", file=sys.stderr)
        sys.exit(130)
