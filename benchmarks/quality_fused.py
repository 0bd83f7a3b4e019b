"""Steps of quality_gpu.py on the stack of quality_stack.py: recipes that `optimize` merges, searched and trained.

A job is NAME=SECONDS or NAME=SECONDS=RATE, such as "prefill 1.20=120" or "2:4=80=0.001". A speed-up is searched on
C4 with selection by magnitude in the folded model, `MARGIN` above the one of its name; a pattern goes into every layer.
Then norms and weights are trained.
"""

import dataclasses
import itertools
import json
import math
import time
from pathlib import Path

import torch
from quality_session import C4, OutOfTimeError, Session, everywhere, tf32
from quality_stack import (
    Divergence,
    Patterns,
    Stack,
    folded,
    patterns_of,
    sparse_model,
    tensors_of,
    token_divergences,
    write_text,
)
from quality_training import _step
from torch import Tensor

from nm_act.lab.calibrate.data import split_windows
from nm_act.lab.calibrate.training import BETAS, LARGEST_GRADIENT
from nm_act.lab.cost import Measured, places_of, predictions, shapes_of
from nm_act.lab.evaluate.perplexity import mean_and_stderr
from nm_act.lab.evaluate.study import DENSE_VARIANT, from_recipe
from nm_act.lab.evaluate.variants import Variant, resolved
from nm_act.lab.measured import MERGED
from nm_act.lab.overlap import check_apart, fingerprints
from nm_act.lab.search.options import option_name, parse_option
from nm_act.lab.search.sensitivity import groups_of
from nm_act.lab.search.solve import Problem
from nm_act.recipe import DEFAULT_PROJECTIONS, Recipe, Rule

SHAPES = "llama-3-8b"
KEEPS = (8, 10, 12, 14, 16, 18, 20, 22, 24, 28)
"""Of 32, in decode."""
WARM_UP = 64
TIMED = 24
"""The first steps, which tell how many there will be."""
CHECKS = 6
DENSE = (None,) * len(MERGED)
RATES = {"2:4": 8e-4}
RATE = 5e-4
MARGIN = 1.005
"""A recipe is searched for a prediction so much above its name, to hold it when tables are measured anew."""


class Fused:
    """What the jobs share: the dense and the folded tensors, the texts, what was measured."""

    def __init__(self, session: Session):
        self.session, options = session, session.options
        self.dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
        config = session.dense.config
        self.teacher_tensors = tensors_of(session.dense)
        self.folded = folded(self.teacher_tensors, config.num_attention_heads, config.num_key_value_heads)
        windows, held_out = (each.to(session.device) for each in split_windows(session.windows))
        self.c4, self.held_out, self.length = windows, held_out, windows.shape[1]
        self.teacher = Stack.of(session.dense, self.length, self.dtype)
        self.cache = Path(options.cache)
        self.cache.mkdir(parents=True, exist_ok=True)
        self.store = session.output / "sensitivities-fused.jsonl"
        lines = self.store.read_text().splitlines() if self.store.is_file() else []
        self.known = {tuple(each["key"]): each["kl"] for each in map(json.loads, lines)}
        self._pool: Tensor | None = None

    @property
    def pool(self) -> Tensor:
        """Windows to train on: C4's, and those that the dense model wrote."""
        if self._pool is None:
            try:
                self._pool = torch.cat([self.c4, self.written()])
            except RuntimeError as error:
                self.session.say("failed: text that the model writes; trained on C4 alone", error)
                self._pool = self.c4
            if self.session.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._pool

    def train_on_c4(self) -> None:
        """Leave out what the dense model writes."""
        self._pool = self.c4

    def written(self) -> Tensor:
        """Text by the dense model, at temperature 1, begun with 1 to 128 tokens of C4's windows to train on."""
        session, options = self.session, self.session.options
        file = self.cache / "written.pt"
        if file.is_file():
            return torch.load(file).to(session.device).long()
        start, parts = time.perf_counter(), []
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(1)
        for _ in range(options.written // options.written_at_once):
            if time.perf_counter() - start > options.written_seconds:
                break
            count = options.written_at_once
            chosen = torch.randint(len(self.c4), (count,), generator=generator).to(session.device)
            shift = torch.randint(self.length // 2, (count, 1), generator=generator).to(session.device)
            columns = torch.arange(self.length, device=session.device)
            begun = self.c4[chosen].gather(1, (columns + shift) % self.length)
            few = torch.randint(1, 9, (count,), generator=generator)
            many = torch.randint(9, self.length // 4 + 1, (count,), generator=generator)
            lengths = torch.where(torch.arange(count) % 2 == 0, few, many).to(session.device)
            parts.append(write_text(self.teacher, begun, lengths))
        found = torch.cat(parts)
        seen = fingerprints(found)
        for name in session.texts:
            check_apart(session.tensors[f"text.{name}"], seen, "text that the model wrote")
        torch.save(found.to(torch.int32), file)
        said = session.tokenizer.decode(found[1, :80].tolist()) if session.tokenizer is not None else ""
        session.fact("written", windows=len(found), seconds=time.perf_counter() - start, begins=said)
        return found

    def search(self, name: str, phase: str, target: float) -> Recipe:
        """The recipe with the least sum of sensitivities in the folded model at a predicted speed-up."""
        session = self.session
        fact = f"search {name}"
        if fact in session.facts:
            return Recipe.from_dict(session.facts[fact]["recipe"])
        texts = [f"{keep}:32" for keep in session.options.fused_keeps] if phase == "decode" else ["2:4", "2:4+1"]
        specs = {option_name(spec): spec for spec in (parse_option(f"{text} act") for text in texts)}
        groups = groups_of(session.dense, DEFAULT_PROJECTIONS, 1, merged=True)
        cost = Measured("h100", shapes_of(SHAPES), SHAPES, phases=(phase,))
        problem = Problem(groups, self.sensitivities(phase, groups, specs), specs, cost)
        choice = problem.solve(MARGIN * target)
        recipe = dataclasses.replace(problem.recipe(choice), phase="decode" if phase == "decode" else "both")
        found = predictions(cost, places_of(SHAPES, session.dense.config.num_hidden_layers), recipe)[phase]
        session.fact(fact, recipe=recipe.to_dict(), predicted=found, sensitivity=choice.sensitivity)
        return recipe

    @torch.no_grad()
    def sensitivities(self, phase: str, groups, specs) -> dict[str, dict[str, float]]:
        """KL by group and option; those of the options of a phase serve every target."""
        session = self.session
        stack = Stack(session.dense, self.length, self.dtype, self.folded)
        windows = self.c4[: session.options.sensitivity_windows]
        wanted = self.teacher.hidden(windows).flatten(0, 1)
        inputs = [torch.nn.functional.embedding(windows, stack.embedding)]
        for index in range(stack.layers):
            inputs.append(stack.layer(index, inputs[-1], DENSE))

        def kl(layer: int, place: int, pattern) -> float:
            own = [pattern if index == place else None for index in range(len(MERGED))]
            x = stack.layer(layer, inputs[layer], own)
            for index in range(layer + 1, stack.layers):
                x = stack.layer(index, x, DENSE)
            return token_divergences(stack.normed(x).flatten(0, 1), wanted, stack.head).mean().item()

        found: dict[str, dict[str, float]] = {}
        for group in groups:
            layer = group.layers[0]
            place = next(index for index, names in enumerate(MERGED) if group.projections[0] in names)
            for name, spec in specs.items():
                key = phase, group.key, name
                if key not in self.known:
                    session.need(5)
                    self.known[key] = kl(layer, place, spec.pattern)
                    with self.store.open("a") as file:
                        file.write(json.dumps({"key": key, "kl": self.known[key]}) + "\n")
                found.setdefault(group.key, {})[name] = self.known[key]
        return found

    def train(
        self,
        name: str,
        recipe: Recipe,
        seconds: float,
        rate: float,
        *,
        kind: type[Stack] = Stack,
        tensors: list[Tensor] | None = None,
        steps: int | None = None,
        first: int = 0,
    ) -> tuple[list[Tensor], dict]:
        """The tensors with the least held-out loss of a training that takes so long, and what happened.

        By default of the folded model; `steps` counts instead of the time, the tensors before `first` stay as they
        are, and `pool` is what is trained on.
        """
        session, device, batch = self.session, self.session.device, self.session.options.fused_batch
        patterns = patterns_of(everywhere(recipe), self.teacher.layers)
        tensors = self.folded if tensors is None else tensors
        student = kind(session.dense, self.length, self.dtype, tensors)
        masters = [each.clone() for each in tensors[first:]]
        leaves = [each.requires_grad_() for each in student.tensors[first:]]
        for master in masters:
            master.grad = torch.zeros_like(master)
        optimizer = torch.optim.AdamW(masters, lr=rate, betas=BETAS, weight_decay=0.0, fused=device.type == "cuda")
        ids = self.pool[:batch].clone()

        def loss_of() -> Tensor:
            with torch.no_grad():
                wanted = self.teacher.hidden(ids).flatten(0, 1)
            return Divergence.apply(student.hidden(ids, patterns).flatten(0, 1), wanted, student.head)

        start = time.perf_counter()
        forward_backward = _step(loss_of, leaves, device)
        before = best = self.losses(student, patterns)
        kept, history, total = [each.clone() for each in masters], [], steps
        generator = torch.Generator().manual_seed(0)
        order, step, timed = iter(()), 0, time.perf_counter()
        while total is None or step < total:
            chosen = list(itertools.islice(order, batch))
            if len(chosen) < batch:
                order = iter(torch.randperm(len(self.pool), generator=generator).tolist())
                chosen = list(itertools.islice(order, batch))
            ids.copy_(self.pool[torch.tensor(chosen, device=device)])
            loss = forward_backward()
            torch._foreach_copy_([each.grad for each in masters], [each.grad for each in leaves])
            torch.nn.utils.clip_grad_norm_(masters, LARGEST_GRADIENT)
            step += 1
            behind = 1.0 if total is None else min(1.0, (total - step + 1) / max(1, total - WARM_UP))
            optimizer.param_groups[0]["lr"] = rate * min(step / WARM_UP, behind)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(leaves, masters)
            if step in (1, 2, TIMED) or step % 256 == 0:
                value = loss.item()  # waits for the device
                session.say(f"  step {step}/{total}, loss {value:.4f}")
                if not math.isfinite(value):
                    raise ValueError(f"expected a finite loss of {name}, got {value}; lower its rate")
                if total is not None and session.left < 5:
                    total = step
            if step == TIMED and steps is None:
                now = time.perf_counter()
                each = (now - timed) / step
                total = step + max(TIMED, int((seconds - (now - start)) / (each * 1.02)))
                session.say(f"  {each * 1e3:.1f} ms a step of {batch} windows: {total} steps in all")
            if total is not None and (step % max(1, total // CHECKS) == 0 or step == total):
                now = self.losses(student, patterns)
                history.append({"step": step, "loss": loss.item(), "held_out": math.fsum(now) / len(now)})
                session.say(f"  step {step}/{total}, held out {history[-1]['held_out']:.4f}")
                if session.left < 5:
                    total = step
                if math.fsum(now) < math.fsum(best):
                    best, kept = now, [each.detach().clone() for each in masters]
        difference, stderr = mean_and_stderr([new - old for new, old in zip(best, before, strict=True)])
        facts = {
            "before": math.fsum(before) / len(before),
            "after": math.fsum(best) / len(best),
            "difference": difference,
        }
        facts |= {"stderr": stderr, "steps": step, "batch": batch, "rate": rate, "history": history}
        return [*tensors[:first], *kept], facts | {"seconds": time.perf_counter() - start}

    @torch.no_grad()
    def losses(self, stack: Stack, patterns: Patterns) -> list[float]:
        """Mean KL of every held-out window."""
        found = []
        for ids in self.held_out.split(8):
            hidden, wanted = (each.flatten(0, 1) for each in (stack.hidden(ids, patterns), self.teacher.hidden(ids)))
            found += token_divergences(hidden, wanted, stack.head).view(len(ids), -1).mean(dim=1).tolist()
        return found

    def trained(self, name: str, recipe: Recipe, seconds: float, rate: float) -> list[Tensor]:
        """`train`, unless its result lies in the cache."""
        file, fact = self.cache / f"{name.replace(' ', '-').replace(':', 'x')}.pt", f"train {name}"
        if fact in self.session.facts and file.is_file():
            return torch.load(file, map_location=self.session.device)
        with tf32(self.session.device):
            tensors, facts = self.train(name, recipe, seconds, rate)
        self.session.fact(fact, **facts)
        torch.save(tensors, file)
        return tensors

    def measure(self, name: str, recipe: Recipe, tensors: list[Tensor], layers: str, on: str = "") -> None:
        """Rows of a recipe with these tensors: every text in float32, the short tasks in bfloat16."""
        session, variant = self.session, _variant(name, recipe, layers, on)
        if layers == "search" and not on:
            windows = f"{session.options.sensitivity_windows} windows of {self.length} tokens for the sensitivities"
            variant = dataclasses.replace(variant, calibrated_on=f"{C4}, {windows}")
        model = sparse_model(session.dense, everywhere(recipe), tensors)
        session.measure(variant, model)
        if on and session.options.tasks_of_trained:
            names = session.tasks if session.options.all_tasks else session.tasks[:5]
            session.measure(DENSE_VARIANT, None, ["wikitext2"], names, dtype="bfloat16")
            session.measure(variant, model, ["wikitext2"], names, dtype="bfloat16")
        self.greedy(name, tensors, recipe)

    @torch.no_grad()
    def greedy(self, name: str, tensors: list[Tensor], recipe: Recipe | None) -> None:
        """How many greedy tokens agree with the dense model's before the first that differs: its own continuations."""
        session = self.session
        if f"greedy {name}" in session.facts:
            return
        prompt, new = 64, 64
        if session.options.tiny:
            prompt, new = 8, 8
        texts = torch.cat([session.tensors[f"text.{text}"].long() for text in ("wikitext2", "c4")])
        prompts = texts[: len(texts) // prompt * prompt].view(-1, prompt).to(session.device)
        if session.options.tiny:
            prompts = prompts[:4]
        stack = Stack(session.dense, prompt + new, torch.float32, tensors)
        dense = Stack.of(session.dense, prompt + new, torch.float32)
        if getattr(self, "_continued", None) is None:
            forced = torch.cat([prompts, torch.zeros_like(prompts[:, :1]).expand(-1, new)], dim=1)
            lengths = torch.full((len(prompts),), prompt, device=session.device)
            self._continued = write_text(dense, forced, lengths, 0.0)
        patterns = None if recipe is None else patterns_of(everywhere(recipe), stack.layers)
        agreed, equal = [], []
        for ids in self._continued.split(64):
            logits = torch.nn.functional.linear(stack.hidden(ids, patterns)[:, prompt - 1 : -1], stack.head)
            same = (logits.argmax(dim=-1) == ids[:, prompt:]).long()
            agreed += same.cumprod(dim=1).sum(dim=1).tolist()
            equal += same.float().mean(dim=1).tolist()
        (tokens, stderr), (share, other) = mean_and_stderr(agreed), mean_and_stderr(equal)
        facts = {"tokens": tokens, "stderr": stderr, "of": new, "prompts": len(agreed)}
        session.fact(f"greedy {name}", **facts, share=share, share_stderr=other)


def _variant(name: str, recipe: Recipe, layers: str, on: str = "") -> Variant:
    method = "act trained weights" if on else "act folded"
    variant = from_recipe(recipe, name, calibrated=bool(on), calibrated_on=on, layers=layers)
    return dataclasses.replace(variant, method=method)


def fused(session: Session) -> None:
    """The jobs of --jobs, in their order."""
    shared = Fused(session)
    for job in session.options.jobs.split(","):
        name, seconds, *rate = job.strip().split("=")
        session.say(f"-- {job}")
        try:
            _job(shared, name, float(seconds), float(rate[0]) if rate else RATES.get(name, RATE))
        except (ValueError, RuntimeError) as error:
            if isinstance(error, OutOfTimeError):
                raise
            session.say("failed", name, error)


def _job(shared: Fused, name: str, seconds: float, rate: float) -> None:
    session = shared.session
    phase, _, target = name.partition(" ")
    if target:
        title, folded_title, layers = f"{name}x act trained weights", f"{name}x act folded", "search"
        recipe = shared.search(f"{name}x act", phase, float(target))
    else:
        title, folded_title, layers = f"{name} act trained weights", f"act folded {name}", "all"
        recipe = Recipe(name, phase="both" if name == "2:4" else "decode")
    shared.measure(folded_title, recipe, shared.folded, layers)
    session.need(min(seconds, 20))
    tensors = shared.trained(title, recipe, min(seconds, session.left - 12), rate)
    facts = session.facts[f"train {title}"]
    written = len(shared.pool) - len(shared.c4)
    on = f"{C4}, {len(shared.c4)} windows of {shared.length}"
    on += f", and {written} that the dense model wrote, begun with theirs" if written else ""
    on += f"; norms and weights end to end, {facts['steps']} steps of {facts['batch']} windows, rate {rate:g}"
    shared.measure(title, recipe, tensors, layers, on)


def plain(session: Session) -> None:
    """Untrained: patterns and rules with act in the folded model, and how far greedy generation agrees."""
    shared = Fused(session)
    shared.greedy("dense", shared.teacher_tensors, None)
    for pattern in ("2:4", "8:16", "16:32"):
        shared.greedy(f"act {pattern}", shared.teacher_tensors, Recipe(pattern))
        shared.measure(f"act folded {pattern}", Recipe(pattern), shared.folded, "all")
    down = {"projections": ("down_proj",)}
    for recipe in (
        Recipe("20:32", mitigation=["var"], rules=[Rule(**down, pattern="14:32")], phase="decode"),
        Recipe("10:16", mitigation=["var"], rules=[Rule(**down, pattern="7:16")], phase="decode"),
        Recipe("2:4", projections=("q_proj", "gate_proj", "down_proj"), mitigation=["var"]),
    ):
        name = "+".join(dict.fromkeys(map(str, resolved(recipe))))
        session.measure(from_recipe(recipe, f"rule {name}", layers="rule"), texts=["wikitext2", "c4", "french"])
    for name in ("decode", "prefill"):
        recipe = Recipe.named(name)
        rules = tuple(r if r.criterion is None else dataclasses.replace(r, criterion="act") for r in recipe.rules)
        rules = tuple(dataclasses.replace(r, mitigation=()) for r in rules)
        recipe = dataclasses.replace(recipe, criterion="act", mitigation=(), rules=rules)
        variant = _variant(f"{name} (recommended) act folded", recipe, "rule")
        session.measure(variant, sparse_model(session.dense, everywhere(recipe), shared.folded))
