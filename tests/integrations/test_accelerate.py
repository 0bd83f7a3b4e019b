"""accelerate: a saved checkpoint placed by device_map, weights kept in memory and on disk."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import tp_cases  # noqa: E402
from conftest import needs  # noqa: E402

from nm_act import NMLinear, Recipe, Rule  # noqa: E402

pytestmark = [pytest.mark.contract, needs("accelerate")]

RECIPES = {
    "act": Recipe("8:16"),
    "wina": Recipe("4:8", criterion="wina", mitigation=["var", "dpts-mean"], dense_first_tokens=1),
    "amber": Recipe("2:4", criterion="amber", mitigation=["dpts-median"], phase="prefill"),
    "rest-spts": Recipe("8:16", criterion="wina", mitigation=["rsparse-4", "spts", "ls"]),
    "larosa": Recipe("8:16", mitigation=["larosa"]),
    "wanda": Recipe("4:8", criterion="wanda", rules=[Rule(projections=["up_proj"], criterion="weight-magnitude")]),
}


@pytest.fixture(params=RECIPES)
def folder(request, tmp_path):
    return tp_cases.save(tmp_path / "model", RECIPES[request.param])


@torch.no_grad()
def test_device_map_auto(folder):
    model = tp_cases.load(folder, device_map="auto")
    assert isinstance(model.model.layers[0].mlp.down_proj, NMLinear)
    assert torch.equal(model(tp_cases.ids()).logits, tp_cases.load(folder)(tp_cases.ids()).logits)


def test_without_accelerate(tmp_path, monkeypatch):
    """Transformers' own sentence, before anything is read; tensor parallelism gives it too."""
    from transformers.integrations import accelerate

    monkeypatch.setattr(accelerate, "is_accelerate_available", lambda *_: False)
    tp_cases.save(tmp_path, Recipe("8:16"))
    with pytest.raises(ValueError, match=r"requires `accelerate`\. You can install it with `pip install accelerate`$"):
        tp_cases.load(tmp_path, device_map="auto")


@torch.no_grad()
def test_layers_that_stay_on_disk(folder, tmp_path):
    """accelerate brings their weights in for each call: what derives from them is computed at the first."""
    model = _second_layer_on_disk(folder, tmp_path)
    layer = model.model.layers[1].mlp.down_proj
    assert layer.weight.is_meta
    whole = tp_cases.load(folder)
    for _ in range(2):
        torch.testing.assert_close(model(tp_cases.ids()).logits, whole(tp_cases.ids()).logits, rtol=1e-4, atol=1e-4)
    assert layer.weight.is_meta
    expected = whole.model.layers[1].mlp.down_proj.channel_scale
    if expected is not None:
        torch.testing.assert_close(layer.channel_scale, expected, rtol=1e-6, atol=0)
    generated = [each.generate(tp_cases.ids(), max_new_tokens=4, do_sample=False) for each in (model, whole)]
    assert torch.equal(*generated)


@torch.no_grad()
def test_nothing_of_a_weights_size_stays_in_memory(folder, tmp_path):
    """A method that replaces the weight replaces it in each call of such a layer, and keeps vectors only."""
    model = _second_layer_on_disk(folder, tmp_path)
    model(tp_cases.ids())
    for name, layer in model.model.layers[1].named_modules():
        if isinstance(layer, NMLinear):
            kept = {key: value for key, value in layer.named_buffers() if key not in layer.data()}
            values = sum(value.numel() for value in kept.values() if not value.is_meta)
            assert values <= 2 * layer.in_features + 2 * layer.out_features, f"{name} keeps {list(kept)}"
            assert layer.weight.is_meta


@torch.no_grad()
def test_first_call_under_autocast(tmp_path):
    """What derives from a weight does not depend on the region that its first call is in."""
    folder = tp_cases.save(tmp_path / "model", Recipe("8:16", criterion="wina", mitigation=["rsparse-4", "spts"]))
    model, whole = _second_layer_on_disk(folder, tmp_path), tp_cases.load(folder)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = model(tp_cases.ids()).logits, whole(tp_cases.ids()).logits
    mine, theirs = (each.model.layers[1].mlp.down_proj for each in (model, whole))
    torch.testing.assert_close(mine.shift_out, theirs.shift_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, expected)


def _second_layer_on_disk(folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    return tp_cases.load(
        folder, device_map=places | {"model.rotary_emb": "cpu", "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    )
