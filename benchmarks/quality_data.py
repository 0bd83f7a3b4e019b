"""Tokens of everything that quality_gpu.py measures on and calibrates on, in one compact file.

    python benchmarks/quality_data.py MODEL --data DATA --text code=FILE --text french=FILE --output tokens.safetensors

DATA is a data folder of nm-act eval. The documents of its C4 before --calibration-documents are cut into windows to
calibrate on, those behind them are the held-out text "c4". quality_texts.py makes the files of code and French. Tokens
are kept as 16 bits.
"""

import argparse
import json
from pathlib import Path

import torch
from quality_choices import CHOICES, tokenized
from safetensors.torch import save_file

from nm_act.integrations.checkpoints import load_model, load_tokenizer
from nm_act.lab.calibrate.data import windows_of
from nm_act.lab.overlap import check_apart, fingerprints
from nm_act.lab.texts import find_file, load_text, read_rows, read_text, tokenize

TASKS = ("arc_easy", "arc_challenge", "piqa", "winogrande", "boolq", "hellaswag")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="another held-out text")
    parser.add_argument("--output", required=True)
    parser.add_argument("--tokens", type=int, default=20480, help="of every text")
    parser.add_argument("--length", type=int, default=512, help="of a window to calibrate on")
    parser.add_argument("--calibration-documents", type=int, default=1700)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model) or load_model(options.model)[1]  # which says why there is none
    documents = [row["text"] for row in read_rows(find_file(options.data, "c4"))]
    seen, unseen = (
        documents[part] for part in (slice(options.calibration_documents), slice(options.calibration_documents, None))
    )
    texts = {"wikitext2": load_text("wikitext2", options.data)[0], "c4": "\n\n".join(unseen)}
    texts |= {name: read_text(file) for name, file in (each.split("=", 1) for each in options.text)}
    calibration = windows_of(tokenizer, ["\n\n".join(seen)], "c4", windows=1 << 30, length=options.length, seed=0)
    tensors = {"calibration": calibration}
    for name, text in texts.items():
        tensors[f"text.{name}"] = tokenize(tokenizer, text, options.tokens)
        check_apart(tensors[f"text.{name}"], fingerprints(calibration), "the calibration")
    for task in TASKS:
        questions = [CHOICES[task](row) for row in read_rows(find_file(options.data, task))]
        tensors |= {f"{task}.{name}": value for name, value in packed(tokenized(tokenizer, questions)).items()}
        tensors[f"{task}.right"] = torch.tensor([question.right for question in questions])
    metadata = {"texts": json.dumps(list(texts)), "tasks": json.dumps(TASKS)}
    save_file({name: value.to(torch.uint16) for name, value in tensors.items()}, options.output, metadata)
    print({name: list(value.shape) for name, value in tensors.items()})


def packed(answers: list[list[tuple[list[int], int]]]) -> dict[str, torch.Tensor]:
    """Answers of `tokenized` as flat tensors; an answer that begins as the one before it stores the rest alone."""
    flat, lengths, shared, continuations, counts = [], [], [], [], []
    for each in answers:
        counts.append(len(each))
        before: list[int] = []
        for ids, continuation in each:
            same = next(
                (i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before))
            )
            flat += ids[same:]
            lengths.append(len(ids))
            shared.append(same)
            continuations.append(continuation)
            before = ids
    return {
        name: torch.tensor(values)
        for name, values in {
            "ids": flat,
            "lengths": lengths,
            "shared": shared,
            "continuations": continuations,
            "counts": counts,
        }.items()
    }


def unpacked(tensors: dict[str, torch.Tensor], task: str) -> tuple[list[list[tuple[list[int], int]]], list[int]]:
    """Answers of a task as `score` takes them, and the right ones."""
    ids, lengths, shared, continuations, counts, right = (
        tensors[f"{task}.{name}"].long().tolist()
        for name in ("ids", "lengths", "shared", "continuations", "counts", "right")
    )
    answers, place, index = [], 0, 0
    for count in counts:
        document: list[tuple[list[int], int]] = []
        for _ in range(count):
            new = lengths[index] - shared[index]
            before = document[-1][0] if document else []
            document.append((before[: shared[index]] + ids[place : place + new], continuations[index]))
            place, index = place + new, index + 1
        answers.append(document)
    return answers, right


if __name__ == "__main__":
    main()
