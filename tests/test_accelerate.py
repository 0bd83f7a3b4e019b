"""accelerate: a saved checkpoint placed by device_map, weights kept in memory and on disk."""

import importlib.util

import pytest
import torch

transformers = pytest.importorskip("transformers")

import tp_cases  # noqa: E402

from nm_act import NMLinear, Recipe  # noqa: E402

pytestmark = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")

RECIPES = {
    "act": Recipe("8:16"),
    "wina": Recipe("4:8", criterion="wina", mitigation=["var", "dpts-mean"], dense_first_tokens=1),
    "amber": Recipe("2:4", criterion="amber", mitigation=["dpts-median"], phase="prefill"),
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
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    model = tp_cases.load(
        folder, device_map=places | {"model.rotary_emb": "cpu", "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    )
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
