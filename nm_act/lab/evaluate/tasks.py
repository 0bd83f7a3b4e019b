"""Zero-shot tasks through EleutherAI's lm-evaluation-harness, on the user's own files or on the hub's data.

Prompt, metrics and aggregation of a task are the harness's own. A data folder replaces only its documents; for files in
the layout of common converted sets ({query, choices, gold}, ...), the expressions that map their fields are replaced
too.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...supported import installing
from ..texts import find_splits, read_rows
from .perplexity import mean_and_stderr

_FOLDERS = ("arc", "super_glue/boolq", "piqa", "winogrande", "hellaswag", "ifeval")
"""Where the harness (0.4.13) keeps these tasks."""


@dataclass(frozen=True)
class Layout:
    """Documents in one layout."""

    fields: tuple[str, ...]  # that every document has
    label: str = ""  # field of the right answer; "" where there is nothing to check
    choices: Callable[[dict[str, Any]], Collection[Any]] = lambda row: (None,)  # document -> labels that it may have
    # Whether a number may be written as text. The harness reads text as an index only where it renders a template;
    # elsewhere it would look up the words.
    text: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)  # of the harness's task configuration, to read this layout

    def answer(self, row: dict[str, Any]) -> tuple[object, Collection[Any]]:
        """A document's label, and those that it may have."""
        value = row[self.label] if self.label else None
        if self.text and isinstance(value, str) and value.isdigit():
            value = int(value)
        return value, self.choices(row)


def _indices(name: str) -> Callable[[dict[str, Any]], Collection[Any]]:
    return lambda row: range(len(row[name]))


def _two(row: dict[str, Any]) -> Collection[Any]:
    return range(2)


_QUERY_CHOICES = Layout(
    ("query", "choices", "gold"),
    "gold",
    _indices("choices"),
    text=True,
    overrides={"doc_to_text": "{{query}}\nAnswer:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
)
_PARTIAL = Layout(
    ("context_options", "continuation", "gold"),
    "gold",
    _indices("context_options"),
    text=True,
    # Not Jinja: the harness needs an integer index here, as its own functions for this task return.
    overrides={
        "doc_to_text": lambda row: int(row["gold"]),
        "doc_to_choice": lambda row: row["context_options"],
        "doc_to_target": lambda row: row["continuation"],
    },
)
_ENDINGS = Layout(
    ("query", "choices", "label"),
    "label",
    _indices("choices"),
    text=True,
    overrides={
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "{{label}}",
        "process_docs": lambda documents: documents,
    },
)
_ARC = (
    Layout(("question", "choices", "answerKey"), "answerKey", lambda row: row["choices"]["label"]),
    _QUERY_CHOICES,
)

TASKS = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "boolq": (Layout(("passage", "question", "label"), "label", _two), _QUERY_CHOICES),
    "piqa": (Layout(("goal", "sol1", "sol2", "label"), "label", _two),),
    "winogrande": (Layout(("sentence", "option1", "option2", "answer"), "answer", lambda row: ("1", "2")), _PARTIAL),
    "hellaswag": (
        Layout(("ctx_a", "ctx_b", "activity_label", "endings", "label"), "label", _indices("endings"), text=True),
        _ENDINGS,
    ),
    "ifeval": (Layout(("key", "prompt", "instruction_id_list", "kwargs")),),
}
"""Task name (the harness's) -> the layouts that its documents may have, the harness's own first."""

GENERATION = {"ifeval"}
"""Tasks that generate text; all others score given answers."""

METRICS = {"ifeval": "prompt_level_strict_acc"}
"""The metric that is reported, "acc" for the other tasks."""


@dataclass(frozen=True)
class TaskResult:
    """Result of one task for one model."""

    metric: str
    value: float  # mean over the documents
    stderr: float  # standard error of that mean
    scores: tuple[float, ...]  # one per document, the same documents for every model: differences can be paired


def check_available(tasks: list[str]) -> None:
    """Raise an error if a task is unknown, or a package or resource that it needs is missing."""
    unknown = next((name for name in tasks if name not in TASKS), None)
    if unknown is not None:
        raise ValueError(f"expected tasks among wikitext2, {', '.join(TASKS)}, got {unknown!r}; choose among those")
    needs = ["lm_eval"] if tasks else []
    needs += ["langdetect", "immutabledict", "nltk"] if "ifeval" in tasks else []
    missing = next((package for package in needs if importlib.util.find_spec(package) is None), None)
    if missing is not None:
        raise ImportError(
            f"the tasks need the package {missing}, which is not installed; install it with: {installing('eval')}"
        )
    if "ifeval" in tasks:
        _check_punkt()


def _check_punkt() -> None:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise FileNotFoundError(
            "the task ifeval needs nltk's resource punkt_tab, which is not installed; run "
            "`python -m nltk.downloader punkt_tab`, or set NLTK_DATA to a folder that has it, or leave ifeval out"
        ) from error


def build_task(name: str, folder: str | Path | None = None) -> tuple[Any, dict[str, Any]]:
    """The harness's task object, and where its documents are from: "file" and "sha256", or "hub".

    Without a data folder (see `nm_act.lab.texts.find_file`) the harness downloads from the hub. Raises ValueError if
    the task is unknown, its file has an unknown layout, or a row of every split lacks a field or a valid label; OSError
    if there is no file, or the hub cannot be read.
    """
    check_available([name])
    _quiet()
    member: dict[str, Any] = {"task": name}
    source: dict[str, Any] = {"hub": name}
    if folder is not None:
        path, rows, layout = _documents(name, folder)
        member |= _overrides(rows, layout)
        source = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    try:
        # A group of one: how the harness lets a registered task be changed.
        tasks = _manager().load([{"group": "nm_act", "task": [member]}])["tasks"]
    except Exception as error:
        if folder is not None:
            raise
        first = " ".join(str(error).split())[:160]
        raise OSError(f"cannot read the task {name} from the hub ({first}); name a folder with --data") from error
    return tasks[name], source


@functools.cache
def _manager() -> Any:
    """The harness's index of these tasks; that of all its tasks, thousands of files, would take ten seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / folder) for folder in _FOLDERS]
    if not all(map(os.path.isdir, folders)):  # another version keeps them elsewhere
        return lm_eval.tasks.TaskManager()
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


def _documents(name: str, folder: str | Path) -> tuple[Path, list[dict[str, Any]], Layout]:
    """File, documents and layout of the first split in a data folder in which every document has a label."""
    unlabelled: ValueError | None = None
    for path in find_splits(folder, name):
        rows = read_rows(path)
        layout = _layout(name, path, rows)
        try:
            _check_labels(path, rows, layout)
        except ValueError as error:
            unlabelled = unlabelled or error
        else:
            return path, rows, layout
    assert unlabelled is not None  # without any file find_splits raises
    raise unlabelled


def _layout(name: str, path: Path, rows: list[dict[str, Any]]) -> Layout:
    found = next((layout for layout in TASKS[name] if set(layout.fields) <= set(rows[0])), None)
    if found is None:
        allowed = " or ".join("{" + ", ".join(layout.fields) + "}" for layout in TASKS[name])
        raise ValueError(f"expected rows {allowed} in {str(path)!r}, got {{{', '.join(rows[0])}}}; convert the file")
    return found


def _check_labels(path: Path, rows: list[dict[str, Any]], layout: Layout) -> None:
    """Refuse rows without a valid label, which the harness would count as answered wrongly."""
    for number, row in enumerate(rows, 1):
        lacking = next((name for name in layout.fields if row.get(name) is None), None)
        if lacking is not None:
            raise ValueError(f"expected {lacking} in row {number} of {str(path)!r}, got none; repair or remove the row")
        try:
            label, allowed = layout.answer(row)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected fields as {', '.join(layout.fields)} have them in row {number} of {str(path)!r}, got "
                f"another kind ({' '.join(str(error).split())}); convert the file"
            ) from error
        if not any(type(label) is type(each) and label == each for each in allowed):  # True is not 1, nor is 1.0
            raise ValueError(
                f"expected in row {number} of {str(path)!r} a label among {', '.join(map(repr, allowed))}, got "
                f"{label!r}; use a labelled split or remove the row"
            )


def _overrides(rows: list[dict[str, Any]], layout: Layout) -> dict[str, Any]:
    from datasets import Dataset, DatasetDict

    documents = DatasetDict({"test": Dataset.from_list(rows)})
    return {
        "custom_dataset": lambda **_: documents,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": None,
        "should_decontaminate": False,
        **layout.overrides,
    }


def harness_model(model: Any, tokenizer: Any, batch_size: int = 8) -> Any:
    """The harness's wrapper around a loaded model."""
    _quiet()
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def run_task(task: Any, wrapped: Any, limit: int | None = None) -> TaskResult:
    """Evaluate a `harness_model` on a task of `build_task`, zero-shot, on at most `limit` documents.

    Raises RuntimeError if the likelihood of an answer is NaN.
    """
    import lm_eval

    # The harness draws progress bars wherever it is: without a terminal they would fill a log file.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        output = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=[task],
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=_manager(),
        )
    [name] = output["results"]
    metric = METRICS.get(name, "acc")
    samples = sorted(output["samples"][name], key=lambda sample: sample["doc_id"])
    _check_scores(name, samples)
    scores = tuple(float(sample[metric]) for sample in samples)
    return TaskResult(metric, *mean_and_stderr(scores), scores)


def _check_scores(name: str, samples: list[dict[str, Any]]) -> None:
    """Refuse NaN among the likelihoods of answers, because argmax would choose it."""
    for sample in samples if name not in GENERATION else ():
        if any(math.isnan(likelihood) for likelihood, _ in sample["filtered_resps"]):
            raise RuntimeError(
                f"expected finite likelihoods from the model, got NaN in document {sample['doc_id']} of {name}; try "
                "--dtype float32"
            )


def _quiet() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
