"""The texts of code and French that docs/evaluation/rows.jsonl is measured on, from the releases that have them.

    python benchmarks/quality_texts.py --argparse argparse.py --treebank UD_French-GSD --output TEXTS

writes TEXTS/code.txt and TEXTS/french.txt for quality_data.py; docs/evaluate.md says where the sources come from. A
text of another release would give figures that compare with no committed row, so it is refused.
"""

import argparse
import hashlib
import sys
from pathlib import Path

from nm_act.files import write_atomic

SOURCES = {
    "code": "Debian's argparse.py of Python 3.11.2 (libpython3.11-minimal 3.11.2-6+deb12u9)",
    "french": "UD_French-GSD r2.16",
}
SHA256 = {
    "code": "9cad2261a804a55d7aca32790c999cb11bb546ce13a1c93e584ae57d5f8ea2a1",
    "french": "c07181b688c8a174cb27e3650eda9fb87e9104369c9176ef2abcda2f6f4eab47",
}
"""Of the texts as they are written."""

SENTENCE = "# text = "
"""What a line of a CoNLL-U file begins with that has a whole sentence."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--argparse", type=Path, required=True, metavar="FILE", help=SOURCES["code"])
    parser.add_argument("--treebank", type=Path, required=True, metavar="FOLDER", help=SOURCES["french"])
    parser.add_argument("--output", type=Path, required=True, metavar="TEXTS")
    options = parser.parse_args(arguments)
    try:
        texts = {"code": _read(options.argparse), "french": sentences(options.treebank)}
        for name, text in texts.items():
            check(name, text)
        options.output.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(options.output / f"{name}.txt", text.encode())
    except (OSError, ValueError) as error:
        print(f"quality_texts: {error}", file=sys.stderr)
        return 2
    print(*(f"{SHA256[name]}  {options.output / name}.txt" for name in texts), sep="\n")
    return 0


def sentences(treebank: Path) -> str:
    """Sentences of the treebank's test part, then of its dev part, one a line."""
    parts = [_read(treebank / f"fr_gsd-ud-{part}.conllu") for part in ("test", "dev")]
    # Not splitlines(), which also splits at characters that may stand in a sentence.
    lines = [line for part in parts for line in part.split("\n")]
    return "".join(f"{line.removeprefix(SENTENCE)}\n" for line in lines if line.startswith(SENTENCE))


def check(name: str, text: str) -> None:
    """ValueError if a text is not the one that was measured."""
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != SHA256[name]:
        raise ValueError(
            f"expected the text of {SOURCES[name]} with SHA-256 {SHA256[name][:12]}..., got {found[:12]}...; "
            "take the source from that release"
        )


def _read(path: Path) -> str:
    """Text of a file, with the line feeds that it was released with also where a checkout has carriage returns."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8 text in {str(path)!r}, got another encoding; name the file as released"
        ) from error
    except OSError as error:
        raise type(error)(
            f"cannot read {str(path)!r}: {(error.strerror or str(error)).lower()}; check the path"
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
