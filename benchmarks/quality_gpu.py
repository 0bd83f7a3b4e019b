"""Perplexity, tasks, searches and training of one model's recipes on a GPU, in steps ordered by what they tell.

    python benchmarks/quality_gpu.py MODEL --data tokens.safetensors --output OUT --steps rows,train

tokens.safetensors is what quality_data.py writes. OUT/rows.jsonl gets a line for each result at once, in the form of
docs/evaluation/rows.jsonl (tools/evaluation_report.py OUT/rows.jsonl adds them), OUT/facts.jsonl what else was found:
recipes, losses of training, refits, noise. What is in them is not measured again, so that a second
call continues. No step starts that would end after the limit.
"""

import argparse
import dataclasses
import math
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from quality_blocks import TEXTS, is_learned, measure_trained
from quality_correlated import correlated
from quality_fused import KEEPS, Fused, fused, plain
from quality_noise import noise_floor
from quality_refit import RefitSettings, refit
from quality_session import C4, OutOfTimeError, Session, calibrated, everywhere, tf32, with_mitigation
from quality_side import channels, side
from quality_stack import sparse_model
from quality_training import train_graphed

import nm_act
from nm_act import Recipe
from nm_act.lab.calibrate.data import split_windows
from nm_act.lab.cost import Measured, places_of, predictions, shapes_of
from nm_act.lab.evaluate.study import DENSE_VARIANT, from_recipe, load_study, row_variant
from nm_act.lab.evaluate.variants import resolved, sparse_copy
from nm_act.lab.search.options import option_name, parse_option
from nm_act.lab.search.sensitivity import groups_of, sensitivities
from nm_act.lab.search.solve import Problem
from nm_act.methods.mitigations import data_of, rank_of
from nm_act.recipe import DEFAULT_PROJECTIONS

WINDOW = 2048
EVALUATION = Path(__file__).resolve().parents[1] / "docs" / "evaluation"
SHAPES = "llama-3-8b"
RATES = (2e-4, 5e-4, 1e-3)
"""Learning rates of weights that are tried in a short training."""
DATA_RATE = 3e-3
"""Learning rate of what a recipe learns."""


def rows(session: Session) -> None:
    """Known rows on every text in both dtypes, and the noise of rounding."""
    recipes = [
        Recipe(p, criterion=c, mitigation=m) for c, m in (("act", []), ("wina", ["var"])) for p in ("2:4", "8:16")
    ]
    variants = [DENSE_VARIANT, *map(from_recipe, recipes)]
    row = {"recipe": str(EVALUATION / "searched-1.20.yaml"), "layers": "search", "calibrated": True}
    variants.append(calibrated(row_variant(row)))
    for name in ("decode", "prefill"):
        recipe = Recipe.named(name)
        variants.append(dataclasses.replace(from_recipe(recipe, f"{name} (recommended)"), layers="rule"))
    for dtype in ("float32", "bfloat16"):
        for variant in variants:
            session.measure(variant, dtype=dtype)
    for recipe in recipes[2:]:
        name = f"noise {from_recipe(recipe).name}"
        if name not in session.facts:
            session.need(15)
            tokens = session.tensors["text.wikitext2"].long()[: session.options.tokens]
            deviation, largest = noise_floor(session.model(recipe), tokens, session.options.window)
            session.fact(name, deviation=deviation, largest=largest)


RULES = {
    "10:16, in down 8:16": ("10:16", {"down": "8:16"}),
    "10:16, in down 7:16": ("10:16", {"down": "7:16"}),
    "9:16, in down 7:16": ("9:16", {"down": "7:16"}),
    "8:16, in gate, up and o 10:16": ("8:16", {"gate": "10:16", "up": "10:16", "o": "10:16"}),
    "10:16, in down 7:16, in q, k, v 9:16": ("10:16", {"down": "7:16", "q": "9:16", "k": "9:16", "v": "9:16"}),
    "2:4 in down": ("dense", {"down": "2:4"}),
    "2:4 in gate, up, down": ("dense", {"gate": "2:4", "up": "2:4", "down": "2:4"}),
    "2:4 in gate, down": ("dense", {"gate": "2:4", "down": "2:4"}),
    "2:4 in q, k, v, down": ("dense", {"q": "2:4", "k": "2:4", "v": "2:4", "down": "2:4"}),
}
"""Rules by projection, to choose the recommended recipes among."""


def rules(session: Session) -> None:
    """`RULES` on the test's text and on held-out C4, as if every token were decoded."""
    for name, (pattern, others) in RULES.items():
        parts = tuple(nm_act.Rule(projections=(f"{key}_proj",), pattern=value) for key, value in others.items())
        recipe = Recipe(pattern, criterion="wina", mitigation=["var"], rules=parts)
        session.measure(from_recipe(recipe, f"rule {name}", layers="rule"), texts=["wikitext2", "c4", "french"])


def curve(session: Session) -> None:
    """All layers at keep 12 to 4 of 16, as if every token were decoded."""
    for keep in range(12, 3, -1):
        session.measure(from_recipe(Recipe(f"{keep}:16", criterion="wina", mitigation=["var"])))


def search(session: Session) -> None:
    """Recipes by projection for decode and prefill: the least sum of sensitivities for a predicted speed-up."""
    decode = [parse_option(f"{keep}:16 wina") for keep in session.options.keeps]
    prefill = [parse_option("2:4 wina"), parse_option("2:4+1 wina")]
    for phase, specs, targets in (("decode", decode, (1.45, 1.3, 1.617, 1.8)), ("prefill", prefill, (1.2, 1.1, 1.3))):
        wanted = [target for target in targets if f"search {phase} {target:.2f}" not in session.facts]
        if not wanted:
            continue
        session.need(60)
        specs = {option_name(spec): spec for spec in specs}
        groups = groups_of(session.dense, DEFAULT_PROJECTIONS, session.options.together, merged=True)
        windows = session.windows[: 2 * 1024 // session.windows.shape[1]].reshape(2, -1)
        store = session.output / f"sensitivities-{phase}.jsonl"
        costs = sensitivities(session.dense, windows, groups, specs, store)
        cost = Measured("h100", shapes_of(SHAPES), SHAPES, phases=(phase,))
        problem = Problem(groups, costs, specs, cost)
        for target in wanted:
            try:
                choice = problem.solve(target)
            except ValueError as error:
                session.say(error)
                continue
            recipe = dataclasses.replace(problem.recipe(choice), phase="decode" if phase == "decode" else "both")
            found = predictions(cost, places_of(SHAPES, 30), recipe)[phase]
            session.fact(f"search {phase} {target:.2f}", recipe=recipe.to_dict(), predicted=found)
    for name, fact in list(session.facts.items()):
        if name.startswith("search"):
            recipe = with_mitigation(Recipe.from_dict(fact["recipe"]), ["var"])
            on = f"{C4}, 2 windows of 1024 tokens for the sensitivities"
            variant = from_recipe(recipe, f"{name}x", layers="search", calibrated_on=on)
            session.measure(variant, texts=["wikitext2", "c4"])


def trained_recipes(session: Session) -> Iterator[tuple[str, Recipe, str]]:
    """Name, recipe and what is trained, the most promising first."""
    found = {
        f"{name}x": Recipe.from_dict(fact["recipe"])
        for name, fact in session.facts.items()
        if name.startswith("search")
    }
    learned = ["ls", "lpts", "var"]
    for pattern in ("2:4", "8:16"):
        found[pattern] = Recipe(pattern, criterion="wina", phase="both" if pattern == "2:4" else "decode")
    for name in ("decode", "prefill"):
        found[f"{name} (recommended)"] = with_mitigation(Recipe.named(name), [])
    jobs = [(name, "weights", []) for name in ("2:4", "search decode 1.45x", "search prefill 1.20x")]
    jobs += [(name, "weights", []) for name in ("search prefill 1.10x", "8:16")]
    jobs += [(name, "data", learned) for name in ("2:4", "8:16", "search prefill 1.20x", "search decode 1.45x")]
    jobs += [(name, "weights", []) for name in ("search prefill 1.30x", "search decode 1.62x")]
    jobs += [("2:4", "data", ["rsparse-8-fit"]), ("8:16", "data", ["rsparse-16-fit"])]
    jobs += [(name, "weights", []) for name in ("decode (recommended)", "prefill (recommended)", "search decode 1.80x")]
    for name, what, mitigation in jobs:
        if name in found and session.wants("train", " ".join((name, what, *mitigation))):
            yield name, with_mitigation(found[name], mitigation), what


def untrained(session: Session, recipe: Recipe):
    """The sparse model with learned data where training starts: no shift, a scale of 1."""
    if any(spec.mitigation and spec.mitigation[0].startswith("rsparse") for spec in resolved(recipe)):
        return session.model(recipe)
    model = sparse_copy(session.dense, everywhere(recipe)).model
    for layer in model.modules():
        if isinstance(layer, nm_act.NMLinear) and layer.data():
            start = {key: torch.full_like(value, float(key == "column_scale")) for key, value in layer.data().items()}
            layer.set_data(**start)
    return model


def train(session: Session) -> None:
    """End-to-end training on the dense model's output distribution, straight through the selection."""
    windows, held_out = split_windows(session.windows)
    spent: dict[str, float] = {}
    for short, recipe, what in trained_recipes(session):
        steps = session.options.train_steps
        batch = session.options.batch if what == "weights" else max(1, session.options.batch // 2)
        method = "+".join(dict.fromkeys(m for spec in resolved(recipe) for m in (spec.criterion, *spec.mitigation)))
        name = f"{short} {method} trained {what}"
        if all(("float32", name, text) in session.done for text in session.texts):
            continue
        session.need(spent.get(what, 60.0) + 8)
        rate = DATA_RATE if what == "data" else learning_rate(session, windows, held_out)
        start = time.perf_counter()
        model = untrained(session, recipe)
        try:
            done = trained(session, model, windows, held_out, steps, batch, what, rate)
        except (ValueError, RuntimeError) as error:
            session.say("failed", name, error)
            continue
        spent[what] = time.perf_counter() - start
        on = (
            f"{C4}, {len(windows)} windows of {windows.shape[1]}; {what} end to end, {steps} steps of {batch} windows, "
        )
        on += f"rate {rate:g}" + ("" if done.kept else "; not better on held-out text, kept out")
        variant = from_recipe(recipe, name, calibrated=True, calibrated_on=on)
        layers = variant.layers if variant.layers == "all" else "rule" if "recommended" in name else "search"
        if short in ("2:4", "8:16"):
            layers = "all"
        variant = dataclasses.replace(variant, method=f"{method} trained {what}", layers=layers)
        session.fact(f"train {name}", seconds=spent[what], **dataclasses.asdict(done))
        session.measure(variant, model)
        if session.options.tasks_of_trained:
            session.measure(DENSE_VARIANT, None, ["wikitext2"], session.tasks[:5], dtype="bfloat16")
            session.measure(variant, model, ["wikitext2"], session.tasks[:5], dtype="bfloat16")
        del model


def trained(session: Session, model, windows, held_out, steps: int, batch: int, what: str, rate: float):
    """`train_graphed` with this session's settings."""
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    options = {"steps": steps, "batch": batch, "what": what, "rate": rate, "dtype": dtype}
    with tf32(session.device):
        return train_graphed(model, session.dense, windows, held_out, progress=stopper(session), **options)


def learning_rate(session: Session, windows: torch.Tensor, held_out: torch.Tensor) -> float:
    """The rate for weights with the lowest held-out loss after a short training of 2:4."""
    if "rates" not in session.facts:
        session.need(60)
        recipe, steps = Recipe("2:4", criterion="wina"), session.options.train_steps // 6
        batch, found = session.options.batch, {}
        for rate in RATES:
            model = untrained(session, recipe)
            found[rate] = trained(session, model, windows, held_out[:8], steps, batch, "weights", rate).after
        session.fact("rates", losses=found, rate=min(found, key=found.__getitem__))
    return session.facts["rates"]["rate"]


def stopper(session: Session):
    """Progress that ends a training at the limit."""

    def progress(step: int, steps: int, loss: float) -> None:
        session.need(0)
        session.say(f"  step {step}/{steps}, loss {loss:.4f}")

    return progress


def gaps(session: Session) -> None:
    """Texts that rows of --known lack whose model needs no calibration, and how far `decode` agrees in generation."""
    shared = Fused(session)
    decode = dataclasses.replace(from_recipe(Recipe.named("decode"), "decode (recommended)"), layers="rule")
    if session.wants("gaps", decode.name):
        shared.greedy(decode.name, shared.teacher_tensors, decode.recipe)
        session.measure(decode)
    names = [name for name in session.known if name != decode.name and session.wants("gaps", name)]
    for name in names:
        variant = session.known[name]
        if variant.recipe is None or variant.calibrated or any(map(data_of, resolved(variant.recipe))):
            continue
        if all(("float32", name, text) in session.done for text in session.texts):
            continue
        model = None
        if variant.method == "act folded":
            model = sparse_model(session.dense, everywhere(variant.recipe), shared.folded)
        elif "trained" in variant.method or "refit" in variant.method:
            continue
        try:
            session.measure(variant, model)
        except (ValueError, RuntimeError) as error:
            session.say("failed", name, error)


def study_variants() -> Iterator:
    """Variants of the committed studies: what needs nothing first, low-rank pairs, which take long, last."""
    rows = [row for name in ("study.yaml", "calibrated.yaml") for row in load_study(EVALUATION / name)]
    variants = [row_variant(row) for row in rows]
    yield from (each for each in variants if not each.calibrated)
    yield from (each for each in variants if each.calibrated and not _has_pair(each))
    yield from (each for each in variants if each.calibrated and _has_pair(each))


def _has_pair(variant) -> bool:
    return any(rank_of(spec.mitigation) for spec in resolved(variant.recipe))


def study(session: Session) -> None:
    """Rows of the committed studies without training, on every text."""
    spent = {False: 12.0, True: 40.0}
    for variant in study_variants():
        texts = [text for text in session.texts if ("float32", variant.name, text) not in session.done]
        if is_learned(variant) or not texts or not session.wants("study", variant.name):
            continue
        pair = variant.calibrated and _has_pair(variant)
        if session.left < (spent[pair] if variant.calibrated else 3):
            session.say("no time for", variant.name)
            continue
        start = time.perf_counter()
        try:
            variant = calibrated(variant) if variant.calibrated else variant
            session.measure(variant, session.model(variant.recipe), texts)
        except (ValueError, RuntimeError) as error:
            session.say("failed", variant.name, error)
        if variant.calibrated:
            spent[pair] = time.perf_counter() - start + 2


def blocks(session: Session) -> None:
    """Rows of the committed studies that learn something, trained block by block as the paper does; then tasks.

    Those of which nothing is measured first, then those that lack something.
    """
    wanted = [each for each in study_variants() if is_learned(each) and session.wants("blocks", each.name)]
    order = ["act+lpts+var 2:4", "act+ls+lpts 8:16 alanova", "act+ls+lpts+var 8:16", "act+ls+lpts+var 2:4"]
    wanted.sort(key=lambda each: order.index(each.name) if each.name in order else len(order))
    wanted.sort(key=lambda each: ("float32", each.name, "wikitext2") in session.done)
    some = session.tasks[:5] if session.options.tasks_of_trained else []
    for variant in wanted:
        if not session.rows_left(variant, [text for text in TEXTS if text in session.texts], some):
            continue
        try:
            measure_trained(session, variant, session.options.learned_windows, some)
        except (ValueError, RuntimeError) as error:
            session.say("failed", variant.name, error)


def refits(session: Session) -> None:
    """Ridge refits of the weights: which setting lowers the model's perplexity, beside the error of every layer."""
    dense = RefitSettings(held_out=32)
    relative = dataclasses.replace(dense, first_tokens=1, relative=True)
    tried = [("2:4", dataclasses.replace(relative, strength=strength)) for strength in (1.0, 0.1, 10.0)]
    tried += [("8:16", relative), ("2:4", dense), ("2:4", dataclasses.replace(relative, target="own"))]
    tokens = session.options.refit_windows
    for pattern, settings in tried:
        about = f"{settings.target} {settings.strength:g}" + (
            " relative, first token left out" if settings.relative else ""
        )
        recipe = Recipe(pattern, criterion="wina", mitigation=[])
        name = f"wina {pattern} refit {about}"
        known = f"refit {name}" in session.facts or ("float32", name, "wikitext2") in session.done
        if known or not session.wants("refits", name):
            continue
        session.need(40)
        model, other = session.model(recipe), session.model(recipe)
        windows = torch.cat([session.windows[:tokens], session.windows[-settings.held_out :]])
        start = time.perf_counter()
        report = refit(model, other, windows, settings)
        kept = [each for each in report if each["kept"]]
        change = math.fsum(each["difference"] / each["before"] for each in kept) / max(1, len(kept))
        session.fact(
            f"refit {name}", kept=len(kept), layers=len(report), mean_change=change, seconds=time.perf_counter() - start
        )
        on = f"{C4}, {tokens} windows of {windows.shape[1]}; refit, {about}, {len(kept)} of {len(report)} layers kept"
        variant = from_recipe(recipe, name, calibrated=True)
        variant = dataclasses.replace(variant, method=f"wina refit {about}", calibrated_on=on)
        session.measure(variant, model, ["wikitext2", "c4"])


def tasks(session: Session) -> None:
    """Whole validation sets, bfloat16: criteria, patterns, mitigations, weights against activations, subsets."""
    chosen = [
        ("act", "8:16", []),
        ("wanda", "8:16", []),
        ("act", "16:32", []),
        ("act", "2:4", []),
        ("wina", "8:16", ["var"]),
    ]
    chosen += [("weight-magnitude", "8:16", []), ("wina", "2:4", ["var"]), ("act", "4:8", []), ("act", "50%", [])]
    chosen += [("wanda", "2:4", []), ("weight-magnitude", "2:4", []), ("act", "8:16", ["var"]), ("act", "2:4", ["var"])]
    chosen += [("wina", "12:16", ["var"]), ("act", "8:16", ["dpts-median"]), ("act", "2:4", ["dpts-median"])]
    chosen += [("wina", "8:16", []), ("amber", "8:16", [])]
    variants = [DENSE_VARIANT]
    for name in ("prefill", "decode"):
        variants.append(dataclasses.replace(from_recipe(Recipe.named(name), f"{name} (recommended)"), layers="rule"))
    variants += [from_recipe(Recipe(pattern, criterion=criterion, mitigation=m)) for criterion, pattern, m in chosen]
    for layers in ("amber", "alanova"):
        variants += [row_variant({"pattern": p, "layers": layers}) for p in ("2:4", "8:16")]
    short, long = session.tasks[:5], session.tasks[5:]
    for some, names in ((variants[:3], short), (variants[:8], long), (variants, short), (variants, long)):
        for variant in some:
            wanted = [name for name in names if ("bfloat16", variant.name, name) not in session.done]
            if wanted and session.wants("tasks", variant.name):
                session.need(15)
                if variant.recipe is not None and any(map(data_of, resolved(variant.recipe))):
                    variant = calibrated(variant)
                session.measure(variant, texts=["wikitext2"], tasks=wanted, dtype="bfloat16")


STEPS = {
    each.__name__: each
    for each in (
        *(fused, plain, correlated, rows, rules, curve, search, train, tasks, refits, study),
        *(gaps, blocks, channels, side),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or .gguf file")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)}; NAME:SECONDS limits one")
    parser.add_argument("--limit-seconds", type=float, default=480.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--known", help="a file of rows that need not be measured again, such as the committed one")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: two short windows of everything")
    parser.add_argument("--train-steps", type=int, default=384)
    parser.add_argument("--batch", type=int, default=12, help="windows in a step of training")
    parser.add_argument("--tasks-of-trained", action="store_true")
    parser.add_argument("--all-tasks", action="store_true", help="HellaSwag too")
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="of train, gaps, study, blocks, refits, tasks and side, that of which 'STEP NAME' matches this somewhere",
    )
    parser.add_argument("--jobs", default="decode 1.45=300", help="of the step fused (quality_fused.py)")
    parser.add_argument(
        "--cache", default="/tmp/m", help="where trained weights and the text that the model wrote stay"
    )
    parser.add_argument("--fused-batch", type=int, default=16, help="windows in a step of its training")
    parser.add_argument("--written-seconds", type=float, default=45.0, help="for text that the dense model writes")
    options = parser.parse_args()
    sizes = {
        "tokens": 20480,
        "window": WINDOW,
        "limit": None,
        "calibration": 1 << 30,
        "keeps": (5, 6, 7, 8, 9, 10, 12, 14),
    }
    sizes |= {
        "side_steps": 300,
        "side_ranks": (16, 32, 64, 8),
        "together": 1,
        "refit_windows": 200,
        "learned_windows": 256,
    }
    sizes |= {"written": 16384, "written_at_once": 2048, "sensitivity_windows": 16, "fused_keeps": KEEPS}
    if options.tiny:
        sizes = {"tokens": 128, "window": 64, "limit": 2, "calibration": 120, "keeps": (4, 8), "together": 15}
        sizes |= {"side_steps": 6, "side_ranks": (2, 3, 4), "refit_windows": 60, "learned_windows": 2}
        sizes |= {"written": 8, "written_at_once": 4, "sensitivity_windows": 2, "fused_keeps": (10, 16, 20, 24)}
    vars(options).update(sizes)
    options.commit = options.commit or nm_act.version.commit()
    session = Session(options)
    if options.tiny:
        session.windows = session.windows[:, :48]
    session.say("loaded", torch.__version__, options.commit)
    for name in options.steps.split(","):
        name, _, seconds = name.partition(":")
        session.step_end = time.perf_counter() - session.start + float(seconds or math.inf)
        session.say(f"== {name}")
        try:
            STEPS[name](session)
        except OutOfTimeError as error:
            session.say(f"{name} stopped: {error}")
        except Exception:  # the steps behind it are worth their time all the same
            traceback.print_exc()
            torch.cuda.empty_cache()
    session.say("done")


if __name__ == "__main__":
    main()
