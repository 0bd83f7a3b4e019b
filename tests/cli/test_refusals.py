"""What the commands refuse: one sentence with exit code 2, most of it before a model is loaded, and nothing written."""

import pytest
import tiny_model
from commands import refused, run
from conftest import failing

import nm_act
from nm_act.integrations import checkpoints

WRITTEN = {
    "null.yaml": "pattern: null\n",
    "spts.yaml": "pattern: 2:4\nmitigation: [spts]\n",
    "plain.yaml": "pattern: 2:4\n",
    "decode.yaml": "pattern: 2:4\nphase: decode\n",
    "layer17.yaml": "pattern: 2:4\nskip_layers: [17]\n",
    "rule.yaml": "pattern: 2:4\nrules: [{pattern: 4:8}, {layers: [0], decode_pattern: 6:8}, {layers: [1], pattern: dense}]",
    "methods.yaml": "pattern: 2:4\nrules: [{layers: [0], criterion: wina}, {layers: [1], mitigation: [var]}]",
    "phases.yaml": "pattern: 2:4\ndecode_pattern: 4:8\n",
    "dense.yaml": "pattern: dense\nrules: [{layers: [0], pattern: dense}]",
    "typo.yaml": "patern: '2:4'\n",
    "study.yaml": "rows: [{pattern: 2:4}]",
    "densest.yaml": "rows: [{pattern: [2:4, dense], criterion: wina}]",
    "calibrated.yaml": "rows: [{pattern: 2:4, calibrated: true}]",
    "wikitext2.txt": tiny_model.TEXT,
    "nothing.txt": "",
    "short/wikitext2.txt": "too short",
    "other/c4.txt": "other",
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A sparse checkpoint."""
    place = tmp_path_factory.mktemp("sparse")
    return tiny_model.save(place, lambda model: nm_act.sparsify(model, nm_act.Recipe("8:16")))


@pytest.fixture
def files(tmp_path, sparse):
    """Files that the refused commands name, by the names that stand in braces in their arguments."""
    for name, content in WRITTEN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    named = {path.stem: path for path in tmp_path.iterdir()}
    return {**named, "sparse": sparse, "here": tmp_path, "out": tmp_path / "out"}


EVAL = ["eval", "{model}", "--tasks", "wikitext2", "--data", "{here}", "--output", "{out}"]
PPL = ["ppl", "{model}", "--text", "{wikitext2}"]
GENERATE = ["generate", "{model}"]
CONVERT = ["convert", "{model}", "--output", "{out}"]
GOALLESS = ["search", "{model}", "--text", "{wikitext2}", "--output", "{out}", "--window", "64"]
SEARCH = [*GOALLESS, "--target-speedup", "1.1"]
CALIBRATE = [
    "calibrate",
    "{model}",
    "--output",
    "{out}",
    "--recipe",
    "{spts}",
    "--data",
    "{wikitext2}",
    "--length",
    "16",
]
NEEDS = "expected recipes that need no calibration, got '2:4 act spts'"
METHODLESS = "expected --pattern or --recipe with --criterion and --mitigation, got neither; add --pattern"
BESIDE = "beside a recipe with one pattern for all that it makes sparse, got 'decode' with 14:32, 20:32 in rules; write"
METHODS = [
    (
        ["--criterion", "act"],
        "expected --criterion act beside a recipe with one criterion for all that it makes sparse",
    ),
    (["--mitigation", "var", "--mitigation", "ls"], "expected --mitigation var+ls beside a recipe with one mitigation"),
    (
        ["--pattern", "8:16", "--criterion", "act"],
        "got '{methods}' with wina in rules; write a recipe file with the crit",
    ),
]
INERT = [
    (
        ["--pattern", "dense", "--criterion", "wina"],
        "for --criterion to have an effect on, got 'dense', in which every",
    ),
    (
        ["--pattern", "dense", "--mitigation", "var"],
        "for --mitigation to have an effect on, got 'dense', in which every",
    ),
    (["--recipe", "{plain}", "--pattern", "dense"], "for --recipe to have an effect on, got 'plain dense', in which"),
    (["--recipe", "{dense}", "--criterion", "wina"], "for --criterion to have an effect on, got 'dense', in which"),
    (
        ["--recipe", "{dense}", "--pattern", "dense", "--criterion", "wina", "--mitigation", "var"],
        "for --recipe and --criterion and --mitigation to have an effect on, got 'dense dense', in which every layer is "
        "dense; leave --recipe and --criterion and --mitigation out or choose another pattern",
    ),
]
SPARSE = "but '{sparse}' is a sparse checkpoint; name the checkpoint it was made from"
CONTEXT = "within the model's context of 128 tokens"


def _refused(arguments, folder, files) -> str:
    told = refused(*(argument.format(model=folder, **files) for argument in arguments))
    assert not files["out"].exists()
    return told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PPL, "--pattern", "4:2"], "expected 1 <= N < M, got pattern 4:2"),
        ([*PPL, "--pattern", "9:4"], "expected 1 <= N < M, got pattern 9:4"),
        ([*PPL, "--pattern", "2:5"], "expected a group size M in"),
        ([*PPL, "--pattern", "two"], 'expected a pattern written "N:M"'),
        ([*PPL, "--pattern", "2:4+1@4"], "expected one or two distinct extra columns in 0 to 3"),
        ([*PPL, "--criterion", "nonsense"], "nonsense"),
        ([*PPL, "--mitigation", "nonsense"], "nonsense"),
        ([*PPL, "--pattern", "2:4", "--mitigation", "spts"], NEEDS),
        ([*PPL, "--recipe", "{spts}"], NEEDS),
        ([*PPL, "--calibration", "{here}", "--criterion", "wina"], METHODLESS),
        ([*PPL, "--calibration", "{here}", "--mitigation", "var"], METHODLESS),
        ([*EVAL, "--calibration", "{here}", "--mitigation", "var"], METHODLESS),
        ([*PPL, "--recipe", "{null}"], "expected a value for pattern of a recipe, got none (null)"),
        ([*PPL, "--recipe", "{typo}"], "patern"),
        ([*PPL, "--recipe", "missing.yaml"], "'--recipe': file 'missing.yaml' does not exist"),
        *(
            ([*command, "--recipe", "decode", "--pattern", "8:16"], BESIDE)
            for command in (PPL, EVAL, [*GENERATE, "x"], CONVERT)
        ),
        ([*PPL, "--recipe", "{rule}", "--pattern", "8:16"], "got '{rule}' with 4:8, 6:8 in rules; write a recipe file"),
        ([*PPL, "--recipe", "{phases}", "--pattern", "8:16"], "got '{phases}' with 4:8 in decode_pattern; write"),
        *(
            ([*command, "--recipe", "{methods}", *option], message)
            for command in (PPL, EVAL, [*GENERATE, "x"], CONVERT)
            for option, message in METHODS
        ),
        *(
            ([*command, *options], f"expected sparse layers {message}")
            for command in (PPL, EVAL, [*GENERATE, "x"], CONVERT)
            for options, message in INERT
        ),
        ([*PPL, "--pattern", "8:16", "--pattern", "dense", "--criterion", "wina"], "to have an effect on, got 'dense'"),
        ([*EVAL, "--study", "{densest}"], "expected nothing beside pattern dense in a study's row, got criterion"),
        ([*PPL, "--window", "129"], f"expected a window {CONTEXT}, got 129"),
        ([*PPL, "--window", "4096"], CONTEXT),
        ([*PPL, "--calibration", "{here}"], "no finished calibration at"),
        ([*PPL, "--threads", "0"], "--threads"),
        ([*PPL, "--threads", "99999999999"], "1024"),
        ([*PPL, "--device", "nonsense"], "nonsense"),
        ([*PPL, "--device", "meta"], "which holds no numbers"),
        ([*PPL, "--out", "result.xlsx"], "expected --out to end in .json or .csv"),
        ([*PPL, "--out", "missing/result.json"], "does not exist; create it"),
        ([*PPL, "--out", "{here}"], "expected --out to end in .json or .csv"),
        (["ppl", "{model}", "--text", "{here}/missing.txt"], "cannot read"),
        (["ppl", "{model}", "--text", "{nothing}"], "but there is none"),
        ([*EVAL], "got nothing; add --pattern, --recipe, --calibration or --study"),
        ([*EVAL, "--pattern", "2:4", "--tasks", "mmlu"], "expected tasks among wikitext2, arc_easy"),
        ([*EVAL, "--pattern", "2:4", "--tasks", "boolq", "--window", "64"], "wikitext2 among --tasks beside --window, got boolq"),
        ([*EVAL, "--pattern", "2:4", "--tasks", "boolq", "--max-tokens", "64"], "wikitext2 or leave --max-tokens out"),
        ([*EVAL, "--pattern", "2:4", "--data", "{other}"], "no data for wikitext2"),
        ([*EVAL, "--study", "{calibrated}"], "expected a calibration for 'act 2:4' in --calibrated, got none; make it with nm-act"),
        ([*EVAL, "--study", "{study}", "--criterion", "wina"], METHODLESS),
        ([*EVAL, "--study", "{study}", "--calibrated", "{here}"], "--study with calibrated rows beside --calibrated"),
        ([*EVAL, "--pattern", "2:4", "--mitigation", "spts"], f"{NEEDS} in 'act+spts 2:4'; make its data with"),
        ([*EVAL, "--recipe", "{null}"], "expected a value for pattern"),
        ([*EVAL, "--pattern", "2:4", "--window", "129"], CONTEXT),
        ([*EVAL, "--calibration", "{here}"], "no finished calibration at"),
        ([*GENERATE, ""], "expected a prompt with at least one character"),
        ([*GENERATE, "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        ([*GENERATE, "x", "--pattern", "3"], 'expected a pattern written "N:M"'),
        ([*GENERATE, "x", "--pattern", ""], "expected a pattern"),
        ([*GENERATE, "x", "--criterion", "wina"], METHODLESS),
        ([*GENERATE, "x", "--mitigation", "var"], METHODLESS),
        ([*GENERATE, "x", "--pattern", "2:4", "--mitigation", "spts"], NEEDS),
        *(
            ([*command, "--dtype", dtype], f"expected a dtype among auto, float32, bfloat16, float16, got '{dtype}'")
            for dtype in ("bf16", "float64")
            for command in (PPL, [*EVAL, "--pattern", "2:4"], [*GENERATE, "x", "--max-new-tokens", "4"], SEARCH, CALIBRATE)
        ),
        ([*CONVERT, "--pattern", "2:4", "--dtype", "int8"], "expected a dtype among"),
        ([*GENERATE, "x", "--optimize", "--fp8", "foo"], "expected fp8 among prefill, decode, both, got 'foo'"),
        ([*GENERATE, "x", "--optimize", "--head", "foo"], "expected head among e4m3, int8, got 'foo'"),
        ([*GENERATE, "quick", "--max-new-tokens", "127"], f"expected prompt and new tokens {CONTEXT}, got 2 and 127; use"),
        (["generate", "{sparse}", "x", "--pattern", "2:4"], SPARSE),
        (["ppl", "{sparse}", "--text", "{wikitext2}", "--pattern", "2:4"], SPARSE),
        (["ppl", "{sparse}", "--text", "{wikitext2}"], SPARSE),
        (["calibrate", "{sparse}", *CALIBRATE[2:]], SPARSE),
        (["convert", "{sparse}", "--pattern", "2:4", "--output", "{out}"], SPARSE),
        (CONVERT, "expected --pattern, --recipe or --calibration, got none; add one, --pattern 8:16 for example"),
        ([*CONVERT, "--criterion", "wina"], "expected --pattern, --recipe or --calibration, got none"),
        ([*CONVERT, "--pattern", "4:2"], "expected 1 <= N < M, got pattern 4:2"),
        ([*CONVERT, "--pattern", "two"], 'expected a pattern written "N:M"'),
        ([*CONVERT, "--recipe", "{spts}"], f"{NEEDS} in 'spts'; make its data with nm-act calibrate and name its"),
        ([*CONVERT, "--recipe", "{typo}"], "patern"),
        ([*CONVERT, "--recipe", "missing.yaml"], "'--recipe': file 'missing.yaml' does not exist"),
        ([*CONVERT, "--calibration", "{here}"], "no finished calibration at"),
        ([*CONVERT, "--calibration", "{here}", "--pattern", "2:4"], "--calibration by itself, because its folder holds"),
        ([*CONVERT, "--calibration", "{here}", "--recipe", "{plain}"], "got --recipe too; leave one out"),
        (["convert", "{model}", "--pattern", "2:4"], "missing option '--output'"),
        (["convert", "{model}", "--pattern", "2:4", "--output", "{here}"], "expected a new or empty folder, but"),
        (["convert", "{model}", "--pattern", "2:4", "--output", "{model}"], "expected a new or empty folder, but"),
        (["convert", "{model}", "--pattern", "2:4", "--output", "{nothing}"], "nothing.txt' is a file; choose another"),
        (["convert", "{model}", "--pattern", "2:4", "--output", "{nothing}/in/it"], "nothing.txt' is a file; choose"),
        (GOALLESS, "expected either --target-speedup or --max-drop, got both or neither"),
        ([*SEARCH, "--max-drop", "9"], "expected either --target-speedup or --max-drop, got both or neither"),
        ([*SEARCH, "--target-speedup", "0.5"], "expected --target-speedup of at least 1"),
        ([*GOALLESS, "--max-drop", "0"], "expected --max-drop above 0"),
        ([*SEARCH, "--option", "3:5"], "expected a group size M"),
        ([*SEARCH, "--window", "129"], f"expected a window {CONTEXT}, got 129"),
        ([*SEARCH, "--option", "2:4 spts", "--calibrated", "{here}"], "expected a calibration for"),
        ([*CALIBRATE, "--length", "129"], f"expected --length {CONTEXT}, got 129"),
        ([*CALIBRATE, "--data", "{latin}"], "expected UTF-8 text in"),
        ([*CALIBRATE, "--data", "missing.txt"], "cannot read 'missing.txt'"),
        ([*CALIBRATE, "--recipe", "missing.yaml"], "'--recipe': file 'missing.yaml' does not exist"),
        ([*CALIBRATE, "--recipe", "{plain}"], "expected a recipe with something to calibrate"),
        ([*CALIBRATE, "--device", "abacus"], "expected a device such as cpu or cuda"),
        ([*CALIBRATE, "--lr", "0"], "expected a positive, finite learning rate"),
        ([*CALIBRATE, "--lr", "1e-3"], "expected --lr with a recipe that learns block by block (lpts, ls, ...), got '{spts}'"),
        ([*CALIBRATE, "--loss", "mse", "--epochs", "2"], "expected --epochs, --loss with a recipe that learns"),
        ([*SEARCH, "--data", "{here}"], "expected --text or --data, got both; leave out the one"),
        ([*CALIBRATE, "--epochs", "inf"], "learning rate and number of epochs, got 0.0001 and inf;"),
        ([*CALIBRATE, "--seed", str(2**70)], f"expected a seed from 0 to 2**63 - 1, got {2**70};"),
        ([*CALIBRATE, "--seed", "-1"], "expected a seed from 0 to 2**63 - 1, got -1;"),
        (["demo", "--model", "{model}", "--tokens", "0"], "--tokens"),
    ],
)  # fmt: skip
def test_refused_before_a_model_is_loaded(folder, files, monkeypatch, arguments, message):
    monkeypatch.setattr(checkpoints, "load_model", failing(AssertionError("a model was loaded")))
    assert message.format(**files) in _refused(arguments, folder, files)
    result = run(*(argument.format(model=folder, **files) for argument in arguments))
    assert len(result.stderr.splitlines()) == 1 + ("data: " in result.stderr)  # the sentence: nothing is "loading"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PPL, "--recipe", "{layer17}"], "expected layers that the model has (layers 0 to 1), got 17"),
        (["ppl", "{bad}", "--text", "{wikitext2}"], "truncated or damaged"),
        (["ppl", "{here}/missing", "--text", "{wikitext2}"], "there is no such file or folder"),
        (["ppl", "{here}", "--text", "{wikitext2}"], "holds no config.json"),
        ([*EVAL, "--recipe", "{layer17}"], "expected layers that the model has (layers 0 to 1), got 17"),
        ([*EVAL, "--recipe", "{decode}"], "expected recipes that prune in prefill, where wikitext2 is scored"),
        ([*EVAL, "--pattern", "2:4", "--data", "{short}"], "expected a text of at least one window of 128 tokens, got"),
        (["convert", "{here}/missing", "--pattern", "2:4", "--output", "{out}"], "there is no such file or folder"),
        (["convert", "{here}", "--pattern", "2:4", "--output", "{out}"], "holds no config.json"),
        (["convert", "{bad}", "--pattern", "2:4", "--output", "{out}"], "truncated or damaged"),
        ([*CONVERT, "--recipe", "{layer17}"], "expected layers that the model has (layers 0 to 1), got 17"),
        ([*SEARCH, "--target-speedup", "9"], "expected a target speed-up of at most 1."),
        ([*SEARCH, "--windows", "99"], "expected calibration text of 99 windows of 64 tokens, got"),
        ([*GOALLESS, "--max-drop", "9", "--option", "8:16"], "expected an option faster than dense, got none among 8:16 act; "),
        ([*GOALLESS, "--max-drop", "9", "--option", "2:4 rsparse-24"], "an option faster than dense, got none among 2:4 act rsp"),
    ],
)  # fmt: skip
def test_refused_once_the_model_is_known(folder, files, arguments, message):
    assert message in _refused(arguments, folder, files)
