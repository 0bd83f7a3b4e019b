"""Policy search: sensitivities against a direct computation, the solver against brute force, the command."""

import ctypes
import itertools
import json
import shutil
from pathlib import Path

import pytest
import tiny_model
import torch
from commands import ok, run
from conftest import failing

import nm_act
from nm_act.integrations import checkpoints
from nm_act.lab.cost import Place, Rates, cost_of, places_of, predictions
from nm_act.lab.evaluate.variants import sparse_copy
from nm_act.lab.search.options import parse_option
from nm_act.lab.search.sensitivity import Group, groups_of, sensitivities
from nm_act.lab.search.solve import Problem
from nm_act.recipe import LinearSpec, Recipe, Rule

RATES = Rates({"2:4": (1.4, "test"), "4:8": (1.15, "test")})
SPECS = {"fast": LinearSpec("2:4"), "slow": LinearSpec("4:8"), "useless": LinearSpec("8:16")}


# ---- sensitivities


def test_sensitivities_against_whole_sparse_models(tmp_path):
    model, _ = tiny_model.build()
    model.lm_head.weight.data *= 100  # a random model's predictions are all alike: the divergences would be rounding
    windows = torch.arange(64).view(2, 32) % 300
    groups = groups_of(model, ("q_proj", "down_proj"))
    assert [group.key for group in groups] == ["0:down_proj", "0:q_proj", "1:down_proj", "1:q_proj"]
    specs = {"a": LinearSpec("2:4"), "b": LinearSpec("8:16", "wina", ("var",))}
    before = model(windows).logits
    found = sensitivities(model, windows, groups, specs, tmp_path / "s.jsonl")
    assert torch.equal(model(windows).logits, before)
    for group, (name, spec) in itertools.product(groups, specs.items()):
        fields = {"pattern": str(spec.pattern), "criterion": spec.criterion, "mitigation": spec.mitigation}
        rule = Rule(layers=group.layers, **fields)
        sparse = sparse_copy(model, Recipe("dense", projections=group.projections, rules=[rule])).model
        with torch.no_grad():
            p, q = (m(windows).logits.double().log_softmax(-1) for m in (model, sparse))
        expected = (p.exp() * (p - q)).sum(-1).mean().item()
        assert expected > 0
        assert found[group.key][name] == pytest.approx(expected, rel=0.02)


def test_sensitivities_resume(tmp_path):
    model, _ = tiny_model.build()
    windows = torch.arange(32).view(1, 32)
    groups = groups_of(model, ("v_proj",))
    specs = {"a": LinearSpec("2:4")}
    with pytest.raises(KeyboardInterrupt):
        sensitivities(model, windows, groups, specs, tmp_path / "s.jsonl", failing(KeyboardInterrupt))
    seen = []
    found = sensitivities(model, windows, groups, specs, tmp_path / "s.jsonl", lambda *a: seen.append(a))
    assert seen == [(2, 2)]
    assert set(found) == {"0:v_proj", "1:v_proj"}


def test_layers_together():
    model, _ = tiny_model.build()
    [group] = groups_of(model, ("k_proj",), layers_together=2)
    assert (group.layers, group.macs, group.key) == ((0, 1), 2 * 64 * 32, "0-1:k_proj")


# ---- solver


def _problem(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (6,), generator=generator).tolist()
    groups = [Group((i,), ("x",), ((1, size),), (str(i),)) for i, size in enumerate(sizes)]
    values = torch.rand(6, 3, generator=generator).tolist()
    return groups, {g.key: dict(zip(SPECS, row, strict=True)) for g, row in zip(groups, values, strict=True)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [1.0, 1.04, 1.11, 1.2, 1.3])
def test_solver_against_brute_force(seed, target):
    groups, costs = _problem(seed)
    total = sum(group.macs for group in groups) + 3
    best = float("inf")
    for names in itertools.product(["dense", *SPECS], repeat=6):
        rates = [1.0 if n == "dense" else RATES.speedup(str(SPECS[n].pattern))[0] for n in names]
        speedup = total / (3 + sum(g.macs / r for g, r in zip(groups, rates, strict=True)))
        if speedup >= target - 1e-9:
            best = min(best, sum(costs[g.key][n] for g, n in zip(groups, names, strict=True) if n != "dense"))
    if best == float("inf"):
        with pytest.raises(ValueError, match="expected a target speed-up of at most"):
            Problem(groups, costs, SPECS, RATES, others=(Place(0, "x", 1, 3),)).solve(target)
        return
    found = Problem(groups, costs, SPECS, RATES, others=(Place(0, "x", 1, 3),)).solve(target)
    assert found.speedup >= target - 1e-9
    assert found.sensitivity == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("target", [1.1, 1.2, 1.3])
def test_solver_on_a_whole_model(target):
    """30 layers of seven projections, all small against the whole: nothing may be lost group by group."""
    generator = torch.Generator().manual_seed(3)
    sizes = [576 * 576, 576 * 192, 576 * 192, 576 * 576, *[576 * 1536] * 3] * 30
    groups = [Group((i,), ("x",), ((1, size),), (str(i),)) for i, size in enumerate(sizes)]
    values = (10 ** (-2 * torch.rand(210, 3, generator=generator))).tolist()
    costs = {g.key: dict(zip(SPECS, row, strict=True)) for g, row in zip(groups, values, strict=True)}
    found = Problem(groups, costs, SPECS, RATES).solve(target)
    bound = found.bound
    assert found.speedup >= target - 1e-9
    assert 0 < bound <= found.sensitivity + 1e-12
    assert found.sensitivity <= bound * (1 + 1e-6)


def test_solver_on_layers_of_nearly_equal_sizes():
    generator = torch.Generator().manual_seed(5)
    groups = [Group((i,), ("x",), ((1, 10**6 + 7919 * i),), (str(i),)) for i in range(40)]
    values = torch.rand(40, generator=generator).tolist()
    costs = {g.key: {"fast": value, "slow": value / 3} for g, value in zip(groups, values, strict=True)}
    specs = {name: SPECS[name] for name in ("fast", "slow")}
    found = Problem(groups, costs, specs, RATES).solve(1.2)
    assert found.speedup >= 1.2 - 1e-9
    assert found.sensitivity <= found.bound * (1 + 1e-6)


def test_frontier_rises():
    groups, costs = _problem(0)
    points = Problem(groups, costs, SPECS, RATES).frontier(8)
    assert points[0].speedup == 1
    assert points[-1].speedup == pytest.approx(1.4)
    assert [p.sensitivity for p in points] == sorted(p.sensitivity for p in points)


def test_solver_counts_what_mitigations_add():
    """A pair of rank 8 costs 8 (in + out): it pays in the large layer alone."""
    groups = [Group((i,), ("x",), ((size, size),), (str(i),)) for i, size in enumerate((32, 512))]
    specs = {"pair": LinearSpec("2:4", mitigation=("rsparse-8",))}
    costs = {group.key: {"pair": 1.0} for group in groups}
    [*_, fastest] = Problem(groups, costs, specs, RATES).frontier(2)
    assert fastest.names == ("dense", "pair")
    total, saved = 32**2 + 512**2, 512**2 * (1 - 1 / 1.4) - 8 * 1024
    assert fastest.speedup == pytest.approx(total / (total - saved))
    assert Problem(groups, costs, specs, RATES).solve(1.1).names == ("dense", "pair")


def test_the_solver_prints_nothing(capfd):
    """80 layers of four options, for which HiGHS 1.12 (SciPy 1.17) prints lines of its own."""
    rates = Rates({"2:4": (1.41, ""), "4:8": (1.2, ""), "8:16": (1.1, ""), "2:4+1": (1.13, "")})
    factors = {"2:4": 1, "4:8": 0.5, "8:16": 0.3, "2:4+1": 0.25}
    sizes = [8192 * 8192, 8192 * 1024, 8192 * 1024, 8192 * 8192, *[8192 * 28672] * 3] * 80
    groups = [Group((i,), ("x",), ((1, size),), (str(i),)) for i, size in enumerate(sizes)]
    noise = torch.rand(len(groups), 5, generator=torch.Generator().manual_seed(0)).tolist()
    costs = {
        group.key: {
            name: 10 ** (-3 * base) * f * (1 + 0.05 * e) for (name, f), e in zip(factors.items(), rest, strict=True)
        }
        for group, (base, *rest) in zip(groups, noise, strict=True)
    }
    problem = Problem(groups, costs, {name: LinearSpec(name) for name in factors}, rates)
    print("before")
    for target in (1.3, 1.38):
        assert problem.solve(target).speedup >= target
    print("after")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def test_an_option_that_saves_nothing_is_not_chosen_even_for_free():
    groups, costs = _problem(1)
    free = {group.key: {**costs[group.key], "useless": -1.0} for group in groups}
    assert "useless" not in Problem(groups, free, SPECS, RATES).solve(1.1).names


def test_recipe_of_a_choice():
    model, _ = tiny_model.build()
    groups = groups_of(model, ("q_proj", "up_proj"))
    costs = {group.key: {"fast": 1.0 + index} for index, group in enumerate(groups)}
    specs = {"fast": LinearSpec("2:4", "wina", ("var",))}
    problem = Problem(groups, costs, specs, RATES)
    chosen = problem.solve(1.01)
    recipe = problem.recipe(chosen)
    for group, name in zip(groups, chosen.names, strict=True):
        spec = recipe.resolve(group.layers[0], group.projections[0])
        assert spec == (None if name == "dense" else specs["fast"])


def test_options():
    assert parse_option("8:16 wina var") == LinearSpec("8:16", "wina", ("var",))
    with pytest.raises(ValueError, match="expected at most one criterion in the option"):
        parse_option("2:4 act wina")
    with pytest.raises(ValueError, match="expected mitigations among"):
        parse_option("2:4 nonsense")
    with pytest.raises(ValueError, match="expected an option that leaves weights as they are, got '2:4 act permute'"):
        parse_option("2:4 permute")


# ---- command


def _search(*arguments):
    return run("search", *arguments)


def test_command(folder, text, tmp_path):
    base = (folder, "--text", text, "--window", 64, "--windows", 1, "--option", "2:4 var")
    result = _search(*base, "--output", tmp_path / "s", "--target-speedup", "1.08", "--json")
    assert result.exit_code == 0, result.stderr
    assert "was not measured in prefill: the nearest is" in result.stderr
    found = json.loads(result.stdout)
    assert found["predicted_speedup"] == found["predicted"]["prefill"] >= 1.08
    assert {"dense", "search", "all, 2:4 act var", "amber, 2:4 act var", "alanova, 2:4 act var"} == {
        point["name"] for point in found["points"]
    }
    assert Recipe.load(tmp_path / "s" / "recipe.yaml").to_dict() == found["recipe"]
    assert (tmp_path / "s" / "frontier.png").stat().st_size > 1000
    found = json.loads(ok("search", *base, "--output", tmp_path / "s", "--max-drop", "100000", "--json"))
    assert round(found["predicted_speedup"], 4) == max(point["predicted_speedup"] for point in found["points"])
    model = tiny_model.build()[0]
    assert found["predicted_speedup"] == predictions(cost_of(model, "h100"), places_of(model), Recipe("2:4"))["prefill"]
    (tmp_path / "s" / "sensitivities.jsonl").write_text('{"window": 0}\n')
    damaged = _search(*base, "--output", tmp_path / "s", "--target-speedup", "1.08")
    assert "expected window, group, spec, kl in line 1 of" in damaged.stderr


def _calibrate(folder, text, tmp_path, pattern, mitigation, seed=0):
    Recipe(pattern, mitigation=[mitigation]).save(tmp_path / "r.yaml")
    output = tmp_path / "calibrated" / f"act+{mitigation}-{pattern.replace(':', 'x')}"
    small = ("--windows", 2, "--length", 32, "--no-checkpoint", "--data", text, "--seed", seed)
    ok("calibrate", folder, "--recipe", tmp_path / "r.yaml", *small, "--output", output)
    return output


def test_calibrated_options(folder, text, tmp_path):
    folders = {
        "rsparse-4-fit": _calibrate(folder, text, tmp_path, "2:4", "rsparse-4-fit", seed=3),
        "pcs": _calibrate(folder, text, tmp_path, "2:4+1", "pcs", seed=3),
    }
    (tmp_path / "rates.csv").write_text("pattern,speedup,source\n2:4,1.41,test\n")
    base = (folder, "--text", text, "--window", 64, "--windows", 1, "--output", tmp_path / "s", "--json")
    base += ("--rates", tmp_path / "rates.csv")
    options = ("--option", "2:4 rsparse-4-fit", "--option", "2:4+1 pcs")
    refused = _search(*base, *options, "--target-speedup", 1.08)
    assert "expected a calibration for 'act+rsparse-4-fit 2:4' in --calibrated, got none" in refused.stderr
    base += ("--calibrated", tmp_path / "calibrated")
    result = json.loads(ok("search", *base, *options, "--target-speedup", 1.08))
    # The folder is the found recipe's calibration; each layer has the data of its own option.
    found = nm_act.load_calibration(checkpoints.load_model(folder)[0], tmp_path / "s").model
    whole = {n: nm_act.load_calibration(checkpoints.load_model(folder)[0], f).model for n, f in folders.items()}
    sparse = {n: m for n, m in found.named_modules() if isinstance(m, nm_act.NMLinear)}
    assert {layer.spec.mitigation[0] for layer in sparse.values()} == set(folders)
    for name, layer in sparse.items():
        theirs = whole[layer.spec.mitigation[0]].get_submodule(name).data()
        assert all(torch.equal(value, theirs[key]) for key, value in layer.data().items())
    assert json.loads((tmp_path / "s" / "calibration.json").read_text())["seed"] == 3
    # Predicted by the solver as by the model that is made of it.
    recipe = Recipe.load(tmp_path / "s" / "recipe.yaml")
    rates = Rates.load(tmp_path / "rates.csv")
    assert result["predicted_speedup"] == pytest.approx(
        predictions(rates, places_of(tiny_model.build()[0]), recipe)["prefill"]
    )
    # Another option alone is measured; the next goal's recipe without data leaves no calibration behind.
    lines = (tmp_path / "s" / "sensitivities.jsonl").read_text().splitlines()
    ok("search", *base, "--option", "2:4 var", "--target-speedup", 1.05)
    assert (tmp_path / "s" / "sensitivities.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert not {"calibration.safetensors", "calibration.json"} & {path.name for path in (tmp_path / "s").iterdir()}
    # A calibration that was made again is measured again.
    shutil.rmtree(folders["pcs"])
    _calibrate(folder, text, tmp_path, "2:4+1", "pcs", seed=4)
    assert "expected calibrations with one seed, got [3, 4]" in _search(*base, *options, "--max-drop", 900).stderr
    ok("search", *base, "--option", "2:4+1 pcs", "--max-drop", 900)
    rows = [json.loads(line) for line in (tmp_path / "s" / "sensitivities.jsonl").read_text().splitlines()]
    assert len({row["calibration"] for row in rows if row["spec"] == "2:4+1 act pcs"}) == 2


def test_measured_phases(folder, text, tmp_path):
    """Rates of a measured device, for the shapes of another model: prefill, decode, both."""
    base = (folder, "--text", text, "--window", 64, "--windows", 1, "--layers-together", 2, "--output", tmp_path / "s")
    base += ("--device", "h100", "--shapes", "llama-3-8b", "--json")
    found = {}
    for phase, target, options in (
        ("prefill", 1.25, ("2:4",)),
        ("decode", 1.3, ("8:16", "11:16")),
        ("both", 1.2, ("2:4",)),
    ):
        chosen = [part for option in options for part in ("--option", option)]
        result = _search(*base, "--phase", phase, "--merged", *chosen, "--target-speedup", target)
        assert result.exit_code == 0, result.stderr
        found[phase] = json.loads(result.stdout)
        assert found[phase]["predicted_speedup"] >= target
        assert set(found[phase]["predicted"]) == ({"prefill", "decode"} if phase == "both" else {phase})
        assert found[phase]["recipe"]["phase"] == ("decode" if phase == "decode" else "both")
        assert ("68.8% kept in decode was not measured" in result.stderr) == (phase == "decode")
    assert found["both"]["predicted"]["prefill"] >= 1.2
    recipe = Recipe.from_dict(found["both"]["recipe"])
    for layer in range(2):
        assert len({recipe.resolve(layer, name) for name in ("q_proj", "k_proj", "v_proj")}) == 1  # one merged product


def test_measured_options_are_refused(folder, text, tmp_path):
    base = (folder, "--text", text, "--target-speedup", 1.1, "--output", tmp_path / "s")
    assert "expected --phase prefill, decode, both, got 'later'" in _search(*base, "--phase", "later").stderr
    assert "expected shapes among llama-3-8b" in _search(*base, "--shapes", "llama-9").stderr
    (tmp_path / "rates.csv").write_text("pattern,speedup,source\n2:4,1.41,test\n")
    for more in (("--phase", "decode"), ("--shapes", "llama-3-8b"), ("--device", "h100")):
        assert (
            "expected --rates with --phase prefill, without --shapes"
            in _search(*base, "--rates", tmp_path / "rates.csv", *more).stderr
        )


@pytest.mark.parametrize("name", ["recipe.yaml", "calibration.safetensors"])
def test_files_of_something_else_are_kept(folder, tmp_path, name):
    (tmp_path / name).write_text("mine")
    result = _search(folder, "--text", tmp_path / name, "--target-speedup", "1.1", "--output", tmp_path)
    assert f"expected a new folder or that of an earlier run, got {str(tmp_path)!r} with {name}" in result.stderr
    assert (tmp_path / name).read_text() == "mine"


def test_results_of_another_text_or_model_are_not_taken_up(folder, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_model.TEXT)
    base = ("--text", tmp_path / "text.txt", "--window", 32, "--option", "2:4", "--target-speedup", "1.1")
    base += ("--output", tmp_path / "s")
    ok("search", folder, *base, "--windows", 1)
    assert "a run with windows 2, got one with 1" in _search(folder, *base, "--windows", 2).stderr
    (tmp_path / "text.txt").write_text("B" + tiny_model.TEXT)
    assert "a run with token_ids '" in _search(folder, *base, "--windows", 1).stderr
    (tmp_path / "text.txt").write_text(tiny_model.TEXT)
    other = tiny_model.save(tmp_path / "other" / Path(folder).name, tiny_model.another_value)
    assert "a run with weights '" in _search(other, *base, "--windows", 1).stderr
