"""Fill the generated blocks of the documentation from data: readme.py [--check].

`<!-- NAME: begin -->` to `<!-- NAME: end -->` is replaced by what NAME's function in BLOCKS returns. Nothing in those
blocks is written by hand: they come from the compiled support table and from committed result files.
"""

import sys

import pattern_frontier
import quality_tables
import speed_tables
from result_files import ROOT

DOCUMENTS = ("README.md", "docs/operators.md", "docs/results.md", "docs/search.md", "docs/kernels/cpu_decode.md")
DOCUMENTS += ("docs/recipes.md", "docs/serving.md")

BLOCKS = {
    "results": speed_tables.results,
    "support": speed_tables.support,
    "demo": speed_tables.demo,
    "cpu-decode": speed_tables.cpu_decode,
    "cpu-tokens": speed_tables.cpu_tokens,
    "cpu-prepacked": speed_tables.cpu_prepacked,
    "gpu-speed": speed_tables.gpu_speed,
    "inference": speed_tables.inference,
    "turns": speed_tables.turns,
    "quality": quality_tables.quality,
    "best": quality_tables.best,
    "rules": quality_tables.rules,
    "texts": quality_tables.texts,
    "patterns": pattern_frontier.summary,
    "searched": quality_tables.searched,
    "predicted": speed_tables.predicted,
    "generate": speed_tables.generate,
    "served": speed_tables.served,
}


def filled(text: str) -> str:
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{block()}\n{end}{rest.split(end)[1]}"
    return text


def main(arguments: list[str]) -> int:
    stale = [name for name in DOCUMENTS if filled((ROOT / name).read_text()) != (ROOT / name).read_text()]
    if "--check" in arguments:
        if stale:
            print(f"expected the generated blocks of {', '.join(stale)} to be up to date; run python tools/readme.py")
        return int(bool(stale))
    for name in stale:
        (ROOT / name).write_text(filled((ROOT / name).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
