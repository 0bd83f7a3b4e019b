"""Zero-shot tasks through EleutherAI's lm-evaluation-harness, on the user's own files or on the hub's data.

A task is the harness's own (prompt, metrics, aggregation). With a data folder only its documents are replaced; files
in the layout of common converted sets ({query, choices, gold}, ...) bring the three expressions that map their fields.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..texts import find_file, read_rows

__all__ = ["TASKS", "TaskResult", "build_task", "run_task"]

_FOLDERS = ("arc", "super_glue/boolq", "piqa", "winogrande", "hellaswag", "ifeval")
"""Where the harness (0.4.13) keeps these tasks."""

EXTRA = "run `pip install nm_act[eval]`"


@dataclass(frozen=True)
class TaskKind:
    """A task of the harness: its main metric, and how files in other layouts map to it.

    Attributes
    ----------
    metric : str
        Metric that is reported.
    fields : tuple of str
        Fields of a document in the harness's own layout.
    layouts : dict
        Fields of another layout -> the overrides of the harness's task configuration that read it.
    """

    metric: str
    fields: tuple[str, ...]
    layouts: dict[tuple[str, ...], dict]


_QUERY_CHOICES = {
    "doc_to_text": "{{query}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
}
# Not Jinja: the harness takes an index only as an integer here, as its own functions for this task return one.
_PARTIAL = {
    "doc_to_text": lambda row: row["gold"],
    "doc_to_choice": lambda row: row["context_options"],
    "doc_to_target": lambda row: row["continuation"],
}
_ENDINGS = {"doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "{{label}}"}

_ARC = TaskKind("acc", ("question", "choices", "answerKey"), {("query", "choices", "gold"): _QUERY_CHOICES})

TASKS = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "boolq": TaskKind("acc", ("passage", "question", "label"), {("query", "choices", "gold"): _QUERY_CHOICES}),
    "piqa": TaskKind("acc", ("goal", "sol1", "sol2", "label"), {}),
    "winogrande": TaskKind(
        "acc",
        ("sentence", "option1", "option2", "answer"),
        {("context_options", "continuation", "gold"): _PARTIAL},
    ),
    "hellaswag": TaskKind(
        "acc",
        ("ctx_a", "ctx_b", "activity_label", "endings", "label"),
        {("query", "choices", "label"): {**_ENDINGS, "process_docs": lambda documents: documents}},
    ),
    "ifeval": TaskKind("prompt_level_strict_acc", ("key", "prompt", "instruction_id_list", "kwargs"), {}),
}
"""Task name (the harness's) -> how it is read and which metric is reported."""

GENERATION = {"ifeval"}
"""Tasks that generate text; all others score given answers."""


@dataclass(frozen=True)
class TaskResult:
    """Result of one task for one model.

    Attributes
    ----------
    metric : str
    value : float
        Mean over the documents.
    stderr : float
        Standard error of that mean.
    scores : tuple of float
        One score a document, in order; the same documents for every model of a run, so differences can be paired.
    """

    metric: str
    value: float
    stderr: float
    scores: tuple[float, ...]


def check_available(tasks: list[str]) -> None:
    """Raise a sentence if a task is unknown or a package (or resource) that it needs is missing."""
    unknown = next((name for name in tasks if name not in TASKS), None)
    if unknown is not None:
        raise ValueError(f"expected tasks among wikitext2, {', '.join(TASKS)}, got {unknown!r}; choose of those")
    needs = ["lm_eval"] if tasks else []
    needs += ["langdetect", "immutabledict", "nltk"] if "ifeval" in tasks else []
    missing = next((package for package in needs if importlib.util.find_spec(package) is None), None)
    if missing is not None:
        raise ImportError(f"the tasks need the package {missing}, which is not installed; {EXTRA}")
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


def build_task(name: str, folder: str | Path | None = None):
    """The harness's task object, and a record of where its documents are from.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    folder : str or Path, optional
        Data folder (see `nm_act.texts.find_file`); without one the harness downloads from the hub.

    Returns
    -------
    task : lm_eval.api.task.Task
    source : dict
        "file" and "sha256", or "hub".

    Raises
    ------
    ValueError
        If the task is unknown or its file has an unknown layout.
    OSError
        If there is no file, or the hub cannot be read.
    """
    check_available([name])
    _quiet()
    member: dict = {"task": name}
    source: dict = {"hub": name}
    if folder is not None:
        path = find_file(folder, name)
        member |= _overrides(name, path)
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
def _manager():
    """The harness's index of our tasks; of all of its tasks, thousands of files, it would take ten seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / folder) for folder in _FOLDERS]
    if not all(map(os.path.isdir, folders)):  # another version keeps them elsewhere
        return lm_eval.tasks.TaskManager()
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


def _overrides(name: str, path: Path) -> dict:
    from datasets import Dataset, DatasetDict

    kind, rows = TASKS[name], read_rows(path)
    layouts = {kind.fields: {}, **kind.layouts}
    mapping = next((over for fields, over in layouts.items() if set(fields) <= set(rows[0])), None)
    if mapping is None:
        allowed = " or ".join("{" + ", ".join(fields) + "}" for fields in layouts)
        raise ValueError(f"expected rows {allowed} in {str(path)!r}, got {{{', '.join(rows[0])}}}; convert the file")
    documents = DatasetDict({"test": Dataset.from_list(rows)})
    return {
        "custom_dataset": lambda **_: documents,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": None,
        "should_decontaminate": False,
        **mapping,
    }


def harness_model(model, tokenizer, batch_size: int = 8):
    """The harness's wrapper around a loaded model."""
    _quiet()
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def run_task(task, wrapped, limit: int | None = None) -> TaskResult:
    """Evaluate a model on one task, zero-shot.

    Parameters
    ----------
    task : lm_eval.api.task.Task
        From `build_task`.
    wrapped : lm_eval.api.model.LM
        From `harness_model`.
    limit : int, optional
        Only the first so many documents.

    Raises
    ------
    RuntimeError
        If a score is not finite.
    """
    import lm_eval

    # The harness draws progress bars wherever it is: without a terminal they would fill a log file.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        output = lm_eval.simple_evaluate(
            model=wrapped, tasks=[task], num_fewshot=0, limit=limit, bootstrap_iters=0, log_samples=True
        )
    [name] = output["results"]
    metric = TASKS[name].metric
    samples = sorted(output["samples"][name], key=lambda sample: sample["doc_id"])
    scores = tuple(float(sample[metric]) for sample in samples)
    return TaskResult(metric, *mean_and_stderr(scores), scores)


def mean_and_stderr(values) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation over the root of the count; NaN for one value)."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, float("nan")
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, (variance / count) ** 0.5


def _quiet() -> None:
    """Keep the harness's log lines out of the output."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
