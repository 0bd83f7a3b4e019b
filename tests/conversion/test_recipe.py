"""Recipes: resolution, files, and what each kind of mistake says."""

import json
import re
import warnings
from pathlib import Path

import pytest
import yaml
from conftest import failing
from hypothesis import given, settings
from hypothesis import strategies as st

from nm_act.methods.mitigations import MITIGATIONS, data_of
from nm_act.patterns import NMPattern
from nm_act.recipe import DEFAULT_PROJECTIONS, NAMED, ROLES, LinearSpec, Recipe, Rule
from nm_act.spec import PHASES

FULL = Recipe(
    "8:16",
    projections=["q_proj", "gate_proj", "down_proj"],
    criterion="wina",
    mitigation=["var", "dpts-median"],
    phase="prefill",
    dense_first_tokens=4,
    skip_layers=[0],
    rules=[Rule(layers=[2, 3], projections=["q_proj"], pattern="dense"), Rule(pattern="2:4", phase="both")],
)


def test_spec_accepts_text_and_lists():
    spec = LinearSpec("2:4", "amber", ["var", "dpts-mean"], "decode")
    assert spec == LinearSpec(NMPattern(2, 4), "amber", ("var", "dpts-mean"), "decode")
    assert spec.variance_correction
    assert spec.token_shift == "mean"
    assert str(spec) == "2:4 amber var dpts-mean (decode only)"
    plain = LinearSpec("8:16")
    assert not plain.variance_correction
    assert plain.token_shift == "none"
    assert str(plain) == "8:16 act"
    assert hash(spec) != hash(plain)


def test_defaults():
    recipe = Recipe(NMPattern("8:16"))
    assert recipe.projections == DEFAULT_PROJECTIONS
    assert recipe.pattern == "8:16"
    assert recipe.resolve(5, "up_proj") == LinearSpec("8:16")
    assert recipe.resolve(5, "lm_head") is None


def test_rules_apply_in_order_and_per_field():
    recipe = Recipe(
        "8:16",
        mitigation=["var"],
        skip_layers=[3],
        rules=[
            Rule(layers=[1, 2], pattern="2:4", criterion="wina"),
            Rule(projections=["down_proj"], criterion="amber", mitigation=[]),
            Rule(layers=[2], pattern="dense"),
            Rule(layers=[2], projections=["up_proj"], pattern="4:8", phase="decode"),
            Rule(layers=[3], pattern="2:4"),
        ],
    )
    assert recipe.resolve(0, "q_proj") == LinearSpec("8:16", "act", ("var",))
    assert recipe.resolve(0, "down_proj") == LinearSpec("8:16", "amber", ())
    assert recipe.resolve(1, "q_proj") == LinearSpec("2:4", "wina", ("var",))
    assert recipe.resolve(1, "down_proj") == LinearSpec("2:4", "amber", ())
    assert recipe.resolve(2, "q_proj") is None
    assert recipe.resolve(2, "up_proj") == LinearSpec("4:8", "wina", ("var",), "decode")
    assert recipe.resolve(3, "q_proj") is None, "a skipped layer stays dense whatever the rules say"


@pytest.mark.parametrize(
    ("fields", "where"),
    [({}, "all layers"), ({"layers": [0, 2], "projections": ["q_proj"]}, "layers [0, 2], projections")],
)
def test_a_rule_that_sets_nothing_is_a_warning(tmp_path, fields, where):
    (tmp_path / "recipe.json").write_text(json.dumps({"pattern": "2:4", "rules": [fields]}))
    with pytest.warns(
        UserWarning, match=rf"got one for {re.escape(where)}.* that sets nothing and has no effect; write"
    ):
        rule = Rule(**fields)
    with pytest.warns(UserWarning, match="sets nothing and has no effect"):
        assert Recipe.load(tmp_path / "recipe.json").rules == (rule,)  # read all the same: it may be a saved one


def test_a_rule_may_set_an_empty_list_or_one_field():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for field in ({"mitigation": []}, {"phase": "both"}, {"decode_pattern": "2:4"}, {"pattern": "dense"}):
            Rule(layers=[0], **field)


def test_dense_by_default_and_sparse_by_rule():
    recipe = Recipe("dense", rules=[Rule(layers=[7], pattern="2:4")])
    assert recipe.resolve(0, "q_proj") is None
    assert recipe.resolve(7, "q_proj") == LinearSpec("2:4")


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".YAML"])
def test_file_round_trip(tmp_path, suffix):
    path = tmp_path / f"recipe{suffix}"
    FULL.save(path)
    assert Recipe.load(path) == FULL
    assert Recipe.load(str(path)) == FULL


def test_dict_round_trip_is_plain_data():
    data = FULL.to_dict()
    assert json.loads(json.dumps(data)) == data == yaml.safe_load(yaml.safe_dump(data))
    assert Recipe.from_dict(data) == FULL
    assert data["rules"] == [
        {"layers": [2, 3], "projections": ["q_proj"], "pattern": "dense"},
        {"pattern": "2:4", "phase": "both"},
    ]


@pytest.mark.parametrize("pattern", ["2:4+1", "2:4+2", "2:4+1@3", "2:4+2@0,3"])
def test_yaml_patterns_with_windows_need_no_quotes(tmp_path, pattern):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"pattern: {pattern}\nrules:\n  - layers: [1]\n    pattern: 2:4\n")
    recipe = Recipe.from_yaml(path)
    assert recipe.pattern == pattern
    assert recipe.resolve(0, "q_proj").pattern == NMPattern(pattern)
    recipe.save(tmp_path / "again.yaml")
    assert Recipe.load(tmp_path / "again.yaml") == recipe


def test_yaml_patterns_need_no_quotes(tmp_path):
    text = "pattern: 2:4\ndense_first_tokens: 1\nrules:\n  - layers: [0, 12]\n    pattern: 16:32\n"
    assert yaml.safe_load(text)["pattern"] == 124, "YAML 1.1 reads base 60, which this test guards against"
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = Recipe.from_yaml(path)
    assert recipe == Recipe("2:4", dense_first_tokens=1, rules=[Rule(layers=[0, 12], pattern="16:32")])


def test_the_recipe_of_the_guide(tmp_path):
    guide = Path(__file__).parents[2] / "docs" / "recipes.md"
    path = tmp_path / "recipe.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", guide.read_text(), re.DOTALL)[1])
    recipe = Recipe.load(path)
    assert recipe.resolve(0, "down_proj") is None
    assert recipe.resolve(1, "down_proj") == LinearSpec("2:4", "wina")
    assert recipe.resolve(3, "down_proj") == LinearSpec("8:16", "wina", ("var",))
    assert recipe.resolve(3, "up_proj") is None


_mitigations = st.sampled_from([(), ("var",), ("dpts-mean",), ("var", "dpts-median")])
_patterns = st.sampled_from(["dense", "2:4", "4:8", "7:16", "16:32"])
_layers = st.lists(st.integers(0, 99), max_size=3)
_rules = st.builds(
    Rule,
    layers=st.none() | _layers,
    projections=st.none() | st.lists(st.sampled_from(DEFAULT_PROJECTIONS), max_size=2),
    pattern=st.none() | _patterns,
    criterion=st.none() | st.sampled_from(["act", "wina", "variance", "amber"]),
    mitigation=st.none() | _mitigations,
    phase=st.none() | st.sampled_from(PHASES),
)
_recipes = st.builds(
    Recipe,
    pattern=_patterns,
    mitigation=_mitigations,
    phase=st.sampled_from(PHASES),
    dense_first_tokens=st.integers(0, 8),
    skip_layers=_layers,
    rules=st.lists(_rules, max_size=3),
)


@pytest.mark.filterwarnings("ignore:.*sets nothing and has no effect")
@settings(max_examples=40, deadline=None)
@given(_recipes)
def test_any_recipe_round_trips(tmp_path_factory, recipe):
    folder = tmp_path_factory.mktemp("recipe")
    for suffix in (".yaml", ".json"):
        recipe.save(folder / f"recipe{suffix}")
        loaded = Recipe.load(folder / f"recipe{suffix}")
        assert loaded == recipe
        assert loaded.resolve(1, "q_proj") == recipe.resolve(1, "q_proj")


BAD_DATA = [
    ({}, "expected a recipe with a pattern, got none"),
    ("8:16", "expected a recipe as a mapping of fields, got str"),
    ({"pattern": "8-16"}, 'expected a pattern written "N:M" .*8-16'),
    ({"pattern": "\uff18:16"}, 'expected a pattern written "N:M"'),  # a full-width 8
    ({"pattern": "4:4"}, "expected 1 <= N < M, got pattern 4:4"),
    ({"pattern": 124}, "expected two integers"),
    ({"pattern": "100%"}, "expected a percentage kept between 0 and 100 .*got 100"),
]
BAD_FIELDS = [
    ({"projection": []}, r"'projection'; did you mean 'projections'\?"),
    ({"zzz": 1}, "expected the keys of a recipe among pattern, projections, .*'zzz'; remove it"),
    ({7: 1}, "expected the keys of a recipe .*, got 7; remove it"),
    ({"version": 2}, "expected recipe version 1, got 2; upgrade nm_act$"),
    ({"projections": "q_proj"}, "expected projections as a list, got 'q_proj'"),
    ({"projections": [1]}, r"expected projections as a list of names .*got \[1\]"),
    ({"criterion": "best"}, "expected a criterion among act, .*, wanda, got 'best'"),
    ({"mitigation": "var"}, "expected mitigation as a list, got 'var'; put it in brackets"),
    ({"mitigation": ["vars"]}, "expected mitigations among var, dpts-mean, dpts-median, .*rsparse-<rank>.-fit..-trained., got 'vars'"),
    ({"mitigation": ["dpts-mean", "dpts-median"]}, "expected at most one shift .*dpts-mean and dpts-m"),
    ({"mitigation": ["var", "var"]}, "expected every mitigation once, got var twice"),
    ({"mitigation": ["rsparse-0"]}, "expected mitigations among .*, got 'rsparse-0'"),
    ({"phase": "prefil"}, "expected a phase among both, prefill, decode, got 'prefil'"),
    ({"dense_first_tokens": -1}, "expected dense_first_tokens to be an integer >= 0, got -1"),
    ({"dense_first_tokens": True}, "expected dense_first_tokens .*got True"),
    ({"skip_layers": 3}, "expected layers as a list, got 3"),
    ({"skip_layers": ["0"]}, r"expected layers as a list of integers >= 0 .*got \['0'\]"),
    ({"rules": {"layers": [0]}}, "expected rules as a list"),
    ({"rules": ["2:4"]}, "expected a rule as a mapping of fields, got str"),
    ({"rules": [{"layer": [0]}]}, r"keys of a rule among .*'layer'; did you mean 'layers'\?"),
    ({"rules": [{"criterion": "best"}]}, "expected a criterion among"),
    ({"rules": [{"phase": "both!"}]}, "expected a phase among"),
    ({"projections": ["q_proj"], "rules": [{"projections": ["k_proj"], "pattern": "2:4"}]}, r"expected a rule's projections among the recipe's \(q_proj\), got 'k_proj'; add it"),
]  # fmt: skip


BAD_DATA += [({"pattern": "8:16", **fields}, sentence) for fields, sentence in BAD_FIELDS]


@pytest.mark.parametrize(("data", "sentence"), BAD_DATA)
def test_bad_data(data, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        Recipe.from_dict(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_bad_file_text(tmp_path, suffix):
    path = tmp_path / f"recipe{suffix}"
    path.write_text('{"pattern": "8:16", [')
    with pytest.raises(ValueError, match=rf"expected a recipe in {suffix[1:].upper()}, got invalid text in") as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="got invalid text in"):
        Recipe.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a recipe as a mapping of fields, got list"):
        Recipe.load(path)


@pytest.mark.parametrize("action", [Recipe.load, FULL.save])
def test_bad_suffix(tmp_path, action):
    with pytest.raises(ValueError, match=re.escape("expected a recipe file ending in .yaml, .yml or .json")):
        action(tmp_path / "recipe.toml")


def test_missing_file(tmp_path):
    for name in ("none.yaml", "none.json"):
        with pytest.raises(
            FileNotFoundError, match=rf"expected a recipe file, got '.*{name}' .no file there.; give its path"
        ):
            Recipe.load(tmp_path / name)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.yaml' \(a folder\); give its path, or one of prefill"):
        Recipe.load(tmp_path / "folder.yaml")


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    FULL.save(path)
    monkeypatch.setattr("os.replace", failing(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Recipe("2:4").save(path)
    monkeypatch.undo()
    assert Recipe.load(path) == FULL
    assert [item.name for item in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("3:5",), "expected a group size M"),
        (("2:4", "CLACT"), "expected a criterion among"),
        (("2:4", "act", ("LPTS",)), "expected mitigations among"),
        (("2:4", "act", (["lpts"],)), "expected mitigations among"),
        (("2:4", "act", ("dpts-mean", "lpts")), "expected at most one shift"),
        (("2:4", "act", ("pcs", "larosa")), "expected at most one change of the selection's basis"),
        (("2:4", "act", ("rsparse-4", "rsparse-8")), "expected at most one low-rank pair"),
        (("2:4", "act", ("rsparse-4-fit", "larosa")), "expected no change of the selection's basis .*rsparse-4 without"),
        (("2:4", "wanda", ("var",)), "expected no mitigation where the weights are pruned"),
        (("2:4", "act", (), "never"), "expected a phase among"),
    ],
)  # fmt: skip
def test_bad_spec(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        LinearSpec(*arguments)


def test_every_mitigation_is_known_to_the_spec():
    for name in MITIGATIONS:
        spec = LinearSpec("2:4", mitigation=[name])
        assert spec.variance_correction or spec.token_shift in ("mean", "median") or data_of(spec)


def test_an_empty_list_of_projections_is_a_mistake():
    with pytest.raises(ValueError, match="expected at least one projection, got none"):
        Recipe("2:4", projections=[])


def test_a_yaml_key_given_twice_is_a_mistake(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("pattern: 2:4\npattern: 8:16\n")
    with pytest.raises(ValueError, match="the key 'pattern' is given twice"):
        Recipe.load(path)


@pytest.mark.parametrize("name", NAMED)
def test_recommended_recipes(name, tmp_path):
    recipe = Recipe.named(name)
    assert Recipe.load(name) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    assert recipe.phase == {"balanced": "both"}.get(name, name)
    specs = {projection: recipe.resolve(5, projection) for projection in ROLES}
    assert not any(data_of(spec) for spec in specs.values() if spec)  # nothing to calibrate
    for projection, roles in ROLES.items():  # of every family alike; a layer of several roles has the safest one's
        own = [specs[role] for role in roles]
        kept = max(1.0 if spec is None else spec.pattern.kept_fraction for spec in own)
        spec = specs[projection]
        assert (1.0 if spec is None else spec.pattern.kept_fraction) == kept


def test_unknown_recommendations_are_refused():
    with pytest.raises(
        ValueError, match="expected a name among prefill, decode, balanced, got 'fast'; or load a recipe"
    ):
        Recipe.named("fast")


def test_a_pattern_in_the_place_of_a_recipe_file_is_one_sentence():
    with pytest.raises(ValueError, match=r"expected a recipe file .* got '8:16'; write pattern='8:16'"):
        Recipe.load("8:16")
