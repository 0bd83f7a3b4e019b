"""The model, the tokens, what was measured and the time left: what the steps of quality_gpu.py share."""

import argparse
import copy
import dataclasses
import datetime
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from quality_choices import score
from quality_data import unpacked
from safetensors import safe_open

from nm_act import Recipe
from nm_act.integrations.checkpoints import load_model
from nm_act.lab.calibrate import CalibrationSettings, calibrate
from nm_act.lab.evaluate.perplexity import mean_and_stderr
from nm_act.lab.evaluate.run import model_facts, perplexity_result
from nm_act.lab.evaluate.variants import Variant, resolved, sparse_copy
from nm_act.methods.mitigations import data_of, learned_data_of

C4 = "documents 1 to 1700 of C4"


class OutOfTimeError(Exception):
    """The limit is reached."""


class Session:
    """The model, the tokens, what was measured, and the time left."""

    def __init__(self, options: argparse.Namespace):
        self.start, self.options, self.step_end = time.perf_counter(), options, math.inf
        self.device = torch.device(options.device)
        self.cpu, self.tokenizer = self._loaded()
        self.cpu.requires_grad_(False)
        self.dense = copy.deepcopy(self.cpu).to(self.device)
        with safe_open(options.data, framework="pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            self.texts, self.tasks = (json.loads(file.metadata()[name]) for name in ("texts", "tasks"))
        self.unpacked: dict = {}
        self.windows = self.tensors["calibration"].long()[: options.calibration]
        self.output = Path(options.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.facts = {fact["name"]: fact for fact in self._lines("facts.jsonl")}
        self.done, self._identity = set(), None
        for line in self._lines("rows.jsonl"):
            if "identity" in line:
                self._identity = line["identity"]
            else:
                self.done.add((self._identity["dtype"], line["variant"]["name"], line["task"]))
        self.known: dict[str, Variant] = {}
        if options.known:
            self._know(Path(options.known))

    def _know(self, path: Path) -> None:
        """Take the rows of a file that were measured as here for done, and keep their variants."""
        identity: dict = {}
        for line in map(json.loads, path.read_text().splitlines()):
            if "identity" in line:
                identity = line["identity"]
            elif identity == self._identity_of(identity["dtype"]):
                variant = line["variant"]
                recipe = None if variant["recipe"] is None else Recipe.from_dict(variant["recipe"])
                self.known[variant["name"]] = Variant(**{**variant, "recipe": recipe})
                self.done.add((identity["dtype"], variant["name"], line["task"]))

    def _loaded(self) -> tuple:
        """The model and its tokenizer; a copy in the cache spares the next call the GGUF file's dequantisation."""
        file = Path(self.options.cache) / f"{Path(self.options.model).name}.pt"
        if file.is_file():
            return torch.load(file, weights_only=False)  # written by this script
        found = load_model(self.options.model, dtype="float32")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(found, file)
        except Exception as error:  # whatever it is, the next call only loads again
            file.unlink(missing_ok=True)
            print(f"the loaded model is not kept ({error})", flush=True)
        return found

    def _lines(self, name: str) -> list[dict]:
        path = self.output / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def _append(self, name: str, line: dict) -> None:
        with (self.output / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return min(self.options.limit_seconds, self.step_end) - (time.perf_counter() - self.start)

    def need(self, seconds: float) -> None:
        """Stop where fewer seconds are left."""
        if self.left < seconds:
            raise OutOfTimeError(f"{seconds:.0f} s needed, {self.left:.0f} s left")

    def wants(self, step: str, name: str) -> bool:
        """Whether --only lets a step measure this."""
        return re.search(self.options.only, f"{step} {name}") is not None

    def fact(self, name: str, **values: object) -> None:
        """Keep something that is not a row."""
        self.facts[name] = {"name": name, **values}
        self._append("facts.jsonl", self.facts[name] | {"commit": self.options.commit})
        self.say(name, json.dumps(values)[:300])

    def say(self, *parts: object) -> None:
        print(f"{time.perf_counter() - self.start:6.1f}", *parts, flush=True)

    def write(self, dtype: str, variant: Variant, task: str, result: dict) -> None:
        """Append a row, with the identity of its run in front where that is another one."""
        identity = self._identity_of(dtype)
        if identity != self._identity:
            self._append("rows.jsonl", {"identity": identity})
            self._identity = identity
        record = {"variant": variant.to_dict(), "task": task, **result, "commit": self.options.commit}
        self._append("rows.jsonl", record | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()})
        self.done.add((dtype, variant.name, task))
        self.say(f"{variant.name:40} {task:14} {dtype:9} {result['value']:.4f} ± {result['stderr']:.4f}")

    def _identity_of(self, dtype: str) -> dict:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        identity = {"model": Path(self.options.model).name, "dtype": dtype, "device": name, "limit": self.options.limit}
        return identity | {"tokens": self.options.tokens, "window": self.options.window}

    def measure(self, variant: Variant, model=None, texts=None, tasks=(), dtype: str = "float32") -> None:
        """The rows of a variant that are missing; without a model, that of its recipe."""
        texts = [t for t in (texts or self.texts) if (dtype, variant.name, t) not in self.done]
        tasks = [t for t in tasks if (dtype, variant.name, t) not in self.done]
        if not texts and not tasks:
            return
        self.need(3)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # other processes share the card
        model = self.model(variant.recipe) if model is None else model
        if str(next(model.parameters()).dtype) != f"torch.{dtype}":
            model = copy.deepcopy(model).to(getattr(torch, dtype))
        facts = model_facts(model)
        for text in texts:
            tokens = self.tensors[f"text.{text}"].long()[: self.options.tokens]
            self.write(dtype, variant, text, perplexity_result(model, tokens, self.options.window) | facts)
        for task in tasks:
            self.need(5)
            if task not in self.unpacked:
                self.unpacked[task] = unpacked(self.tensors, task)
            answers, right = self.unpacked[task]
            found = score(model, answers[: self.options.limit], right[: self.options.limit], 32768)
            value, stderr = mean_and_stderr(found)
            result = {"metric": "acc", "value": value, "stderr": stderr, "samples": len(found), "scores": found}
            self.write(dtype, variant, task, result | facts)

    def rows_left(self, variant: Variant, texts, tasks) -> bool:
        """Whether a variant lacks a text in float32 or a task in bfloat16."""
        wanted = [("float32", variant.name, text) for text in texts]
        wanted += [("bfloat16", variant.name, task) for task in tasks]
        return not self.done.issuperset(wanted)

    def model(self, recipe: Recipe | None, windows: int = 8, settings: CalibrationSettings | None = None):
        """A sparse copy in both phases, calibrated on a few windows if its recipe needs data; the dense model."""
        if recipe is None:
            return self.dense
        recipe = everywhere(recipe)
        if not any(map(data_of, resolved(recipe))):
            return sparse_copy(self.dense, recipe).model
        report, _ = calibrate(
            copy.deepcopy(self.cpu), recipe, self.windows[:windows], settings=settings, device=self.device
        )
        return report.model.to(self.device)


def everywhere(recipe: Recipe) -> Recipe:
    """The recipe with all tokens sparse, as if all were decoded."""
    rules = tuple(dataclasses.replace(rule, phase=None) for rule in recipe.rules)
    return dataclasses.replace(recipe, phase="both", rules=rules)


def with_mitigation(recipe: Recipe, mitigation: list[str]) -> Recipe:
    """The recipe with these mitigations in every sparse layer."""
    rules = tuple(
        rule if rule.pattern == "dense" else dataclasses.replace(rule, mitigation=tuple(mitigation))
        for rule in recipe.rules
    )
    return dataclasses.replace(recipe, mitigation=tuple(mitigation), rules=rules)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Products of float32 on tensor cores: for training only."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def calibrated(variant: Variant, windows: int = 8) -> Variant:
    """The variant, said to be calibrated by `Session.model`."""
    learned = any(learned_data_of(spec) for spec in resolved(variant.recipe))
    how = "; what is learned: block by block, one step a window at 0.0001, mse" if learned else ""
    return dataclasses.replace(variant, calibrated=True, calibrated_on=f"{C4}, {windows} windows of 512 tokens{how}")
