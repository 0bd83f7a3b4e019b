"""Runs of a study: every (variant, task) is one result file, so that a killed run goes on where it was."""

import datetime
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..files import write_atomic
from ..search.cost import extra_macs, macs_by_pattern
from .perplexity import perplexity
from .study import Variant
from .tasks import harness_model, run_task

__all__ = ["PERPLEXITY", "RunFolder", "run_study"]

PERPLEXITY = "wikitext2"
"""The task that is a perplexity; all others are the harness's."""

RUN_FILE = "run.json"

_FORMAT = 2
"""Of a run's files: 2 adds extra_macs to the results, and the tokens and window in use to the identity."""


@dataclass(frozen=True)
class RunFolder:
    """A folder with one run: ``run.json`` says what was measured how, ``rows/`` has one file a result.

    Attributes
    ----------
    path : Path
    identity : dict
        What must be equal for results to be comparable: model, dtype, limit, windows, data.
    """

    path: Path
    identity: dict

    @classmethod
    def open(cls, path: str | Path, identity: dict) -> "RunFolder":
        """Create the folder, or go on with the run in it.

        Raises
        ------
        ValueError
            If it holds another run (the sentence names the first difference), results without their ``run.json``, or
            a ``run.json`` of another program, command or format.
        OSError
            If it cannot be written.
        """
        path = Path(path)
        file = path / RUN_FILE
        found = _read_identity(file) if file.is_file() else None
        try:
            (path / "rows").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise type(error)(f"cannot make the folder {str(path)!r}: {reason}; choose another --output") from error
        identity = json.loads(json.dumps(identity))
        if found is not None:
            different = next((key for key in {**found, **identity} if found.get(key) != identity.get(key)), None)
            if different is not None:
                raise ValueError(
                    f"expected in {str(path)!r} a run with {different} {identity.get(different)!r}, got one with "
                    f"{found.get(different)!r}; choose another --output or the same settings"
                )
        elif any((path / "rows").iterdir()):
            raise ValueError(
                f"expected a run in {str(path)!r}, got results without {RUN_FILE}; choose another --output"
            )
        else:
            write_atomic(file, json.dumps({"format": _FORMAT, "identity": identity}, indent=2) + "\n")
        return cls(path, identity)

    def result_path(self, variant: Variant, task: str) -> Path:
        """File of one result."""
        return self.path / "rows" / f"{variant.slug}.{task}.json"

    def has(self, variant: Variant, task: str) -> bool:
        """Whether the result is there; ValueError if it is one of another recipe or calibration of the same name."""
        path = self.result_path(variant, task)
        if not path.is_file():
            return False
        found, wanted = _read_json(path)["variant"], json.loads(json.dumps(variant.to_dict()))
        if any(found.get(key) != wanted[key] for key in ("recipe", "calibrated", "seed", "calibration")):
            raise ValueError(
                f"expected in {str(path)!r} a result of this recipe and calibration, got one of another with the name "
                f"{variant.name!r}; rename it, remove the file or choose another --output"
            )
        return True

    def write(self, variant: Variant, task: str, result: dict) -> None:
        """Write one result, whole or not at all."""
        record = {"variant": variant.to_dict(), "task": task, **result, "commit": commit(), "date": _today()}
        write_atomic(self.result_path(variant, task), json.dumps(record) + "\n")

    @staticmethod
    def read(path: str | Path) -> tuple[dict, list[dict]]:
        """Identity and results of a finished or unfinished run; ValueError if the folder holds none."""
        path = Path(path)
        if not (path / RUN_FILE).is_file():
            raise ValueError(
                f"expected the folder of an evaluation, got {str(path)!r} without {RUN_FILE}; check the path"
            )
        identity = _read_identity(path / RUN_FILE)
        return identity, [_read_json(file) for file in sorted((path / "rows").glob("*.json"))]


def run_study(
    models: Iterable[tuple[Variant, Callable[[], nn.Module]]],
    folder: RunFolder,
    tokenizer,
    *,
    tokens: torch.Tensor | None,
    tasks: dict,
    progress: Callable[[str], None],
    batch_size: int = 8,
) -> None:
    """Measure what is missing of every variant on every task.

    Parameters
    ----------
    models : iterable of (Variant, callable)
        The callable makes the variant's model; it is called only if a result is missing, and its model is released
        before the next one is made.
    folder : RunFolder
    tokenizer : transformers.PreTrainedTokenizerBase
    tokens : Tensor [tokens], int64, optional
        Text of the perplexity; None leaves it out.
    tasks : dict of str to lm_eval Task
        Tasks of the harness.
    progress : callable
        Called with a line before each measurement.
    batch_size : int
        Of the harness's requests.

    Raises
    ------
    RuntimeError
        If the dense model's perplexity is not finite.
    """
    names = ([PERPLEXITY] if tokens is not None else []) + list(tasks)
    for variant, make in models:
        missing = [name for name in names if not folder.has(variant, name)]
        if not missing:
            continue
        model = make()
        macs = {"macs": macs_by_pattern(model), "extra_macs": extra_macs(model)}
        for name in missing:
            progress(f"{variant.name}: {name}")
            start = time.perf_counter()
            if name == PERPLEXITY:
                result = _perplexity(model, tokens, folder.identity["window"])
                if variant.recipe is None and not math.isfinite(result["value"]):
                    raise RuntimeError(
                        f"expected a finite perplexity of the dense model, got {result['value']}; "
                        "the checkpoint is damaged or its dtype overflows, try --dtype float32"
                    )
            else:
                found = run_task(tasks[name], harness_model(model, tokenizer, batch_size), folder.identity["limit"])
                result = {
                    "metric": found.metric,
                    "value": found.value,
                    "stderr": found.stderr,
                    "samples": len(found.scores),
                    "scores": found.scores,
                }
            folder.write(variant, name, {**result, **macs, "seconds": round(time.perf_counter() - start, 1)})
        del model


def _perplexity(model, tokens: torch.Tensor, window: int | None) -> dict:
    found = perplexity(model, tokens, window=window)
    return {
        "metric": "ppl",
        "value": found.value,
        "stderr": found.stderr,
        "samples": found.tokens,
        # Mean loss a window: what paired differences are taken of.
        "scores": [loss * found.windows / found.tokens for loss in found.window_nll],
    }


def commit() -> str:
    """Commit of the checkout that the package runs from, "-dirty" after changes; the version where there is none."""
    from ..version import __version__

    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an environment inside somebody's own repository
        return __version__
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__


def estimate(model: nn.Module, tokens: int, rows: int) -> float:
    """Seconds that `rows` models would take for `tokens` tokens each, from one timed forward of the dense model."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, 256, dtype=torch.int64, device=device)
    with torch.inference_mode():
        model(input_ids=ids[:, :8], use_cache=False)  # the first call pays for set-up
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False).logits[0, -1, 0].item()
    return (time.perf_counter() - start) / ids.numel() * tokens * rows


def request_tokens(task, tokenizer, limit: int | None, sample: int = 16) -> int:
    """About how many tokens a task makes a model read (scored answers) or write at most (generation)."""
    documents = list(task.eval_docs)
    count = len(documents) if limit is None else min(limit, len(documents))
    documents = documents[: min(count, sample)]
    if task.OUTPUT_TYPE == "generate_until":
        return count * int(task.config.generation_kwargs.get("max_gen_toks", 256))
    read = sum(_choice_tokens(task, document, tokenizer) for document in documents)
    return read * count // len(documents)


def _choice_tokens(task, document, tokenizer) -> int:
    context, choices = task.doc_to_text(document), task.doc_to_choice(document)
    shared = context if isinstance(context, str) else task.doc_to_target(document)
    return sum(len(tokenizer(f"{shared} {choice}")["input_ids"]) for choice in choices)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {str(path)!r}, got invalid text ({error}); remove the file") from error


def _read_identity(file: Path) -> dict:
    found = _read_json(file)
    if not isinstance(found, dict) or found.get("format") != _FORMAT or not isinstance(found.get("identity"), dict):
        raise ValueError(
            f"expected a run of format {_FORMAT} in {str(file.parent)!r}, got a {RUN_FILE} of another kind (an older "
            "run, or the state of nm-act calibrate); choose another folder"
        )
    return found["identity"]


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
