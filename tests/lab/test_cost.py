"""Predicted speed-ups: multiplications by pattern, rates, what mitigations add."""

import pytest
import tiny_model

import nm_act
from nm_act.lab.cost import Rates, places_of, predictions
from nm_act.lab.search.sensitivity import groups_of
from nm_act.recipe import Recipe

RATES = Rates({"2:4": (1.4, "test"), "4:8": (1.15, "test")})


def predicted(recipe):
    return predictions(RATES, places_of(tiny_model.build()[0]), recipe)["prefill"]


def test_predicted_speedup_weighs_by_macs():
    recipe = Recipe("2:4", projections=["gate_proj", "up_proj", "down_proj"])
    mlp, attention = 2 * 3 * 64 * 96, 2 * (64 * 64 * 2 + 64 * 32 * 2)
    assert predicted(recipe) == pytest.approx((mlp + attention) / (mlp / 1.4 + attention))


def test_decode_only_layers_are_dense_in_prefill():
    assert predicted(Recipe("2:4", phase="decode")) == predicted(None) == 1


@pytest.mark.parametrize("fp8", [None, "decode"])
def test_optimized_models_are_refused(fp8):
    """Their merged and e4m3 layers are none of the stock linear layers: costs would lack them."""
    model, _ = tiny_model.build()
    nm_act.sparsify(model, Recipe("2:4"))
    nm_act.optimize(model, fp8=fp8)
    for call in (places_of, lambda each: groups_of(each, ("down_proj",))):
        with pytest.raises(ValueError, match=r"model that is not optimized, got one that is; call nm_act\.deoptimize"):
            call(model)


def test_patterns_without_a_row():
    assert RATES.speedup("8:16") == (1.0, "dense product")
    assert RATES.speedup("2:4+1")[0] == pytest.approx(1.4 / 1.25)
    assert RATES.speedup("2:4+2")[0] == pytest.approx(1.4 / 1.5)
    assert RATES.speedup("2:4+1@3")[0] == pytest.approx(1.4 / 1.25)
    assert RATES.speedup("2:4+2@0,3")[0] == pytest.approx(1.4 / 1.5)
    assert RATES.speedup("50%")[0] == RATES.speedup("dense")[0] == 1
    assert Rates({"2:4": (1.4, ""), "2:4+1": (1.3, "own")}).speedup("2:4+1@3") == (1.3, "own")


def test_what_mitigations_add():
    attention, mlp = (64 * 64 * 2 + 64 * 32 * 2), 3 * 64 * 96

    def found(**fields):
        return predicted(Recipe("2:4", projections=["gate_proj", "up_proj", "down_proj"], **fields))

    def speedup(extra):  # of one of the two equal layers
        return pytest.approx((attention + mlp) / (attention + mlp / 1.4 + extra))

    assert found(mitigation=["var", "pcs", "lpts"]) == speedup(0)
    assert found(mitigation=["rsparse-4"]) == speedup(3 * 4 * (64 + 96))
    assert found(mitigation=["larosa"]) == speedup(64 * 64 * 2 + 96 * 96)
    assert found(mitigation=["rsparse-4"], phase="decode") == 1
    assert found(dense_first_tokens=64) == speedup(mlp / 64)
    assert predicted(Recipe("8:16", mitigation=["rsparse-4"])) < 1


def test_rates_from_files(tmp_path):
    (tmp_path / "own.csv").write_text("pattern,speedup,source\n8:16,1.1,mine\n")
    rates = Rates.load(tmp_path / "own.csv")
    assert rates.speedup("8:16") == (1.1, "mine")
    assert rates.speedup("2:4") == Rates.load().speedup("2:4")
    (tmp_path / "best.csv").write_text("pattern,speedup,source\n2:4+1@0,1.3,best\n2:4+1@0,1.1,worse\n")
    assert Rates.load(tmp_path / "best.csv").speedup("2:4+1") == (1.3, "best")  # however a pattern is written
    (tmp_path / "fast.csv").write_text("pattern,speedup,source\n2:4,2,mine\n")
    assert Rates.load(tmp_path / "fast.csv").speedup("2:4+1")[0] == 1.6  # from the new 2:4 row
    header = "bench,device,variant,dtype,pattern,stage,tokens,out_features,in_features,baseline,speedup,torch,date\n"
    rows = [
        "b,H,kernel,bf16,2:4,op,4096,4096,4096,cublas_bf16,1.3,2.11,2026\n",
        "b,H,kernel,bf16,2:4,gemm,4096,4096,4096,cublas_bf16,1.9,2.11,2026\n",
        "b,H,kernel,e4m3,2:4,op,4096,4096,4096,cublas_bf16,2.1,2.11,2026\n",
    ]
    (tmp_path / "bench.csv").write_text(header + "".join(rows))
    assert Rates.load(tmp_path / "bench.csv").speedup("2:4") == (1.3, "H, torch 2.11, 2026: kernel")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "expected a CSV with the columns"),
        ("pattern,speedup,source\n2:4,-1,x\n", "a positive speed-up"),
        ("pattern,speedup,source\n2:4\n", "a positive speed-up"),
        ("pattern,speedup,source\n2:5,1.2,x\n", "expected a group size M"),
        ("pattern,speedup,source\n", "expected a CSV with the columns"),
        (
            "bench,stage,variant,dtype,pattern,baseline,tokens,out_features,in_features,speedup,device,torch,date\n"
            "b,op,k,e4m3,2:4,cublas_bf16,4096,4096,4096,2.4,H,2.11,2026\n",
            "expected rates in .*, got no row that counts",
        ),
    ],
)
def test_bad_rates(tmp_path, content, message):
    (tmp_path / "r.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        Rates.load(tmp_path / "r.csv")
    with pytest.raises(FileNotFoundError, match="no table of rates"):
        Rates.load(tmp_path / "missing.csv")
