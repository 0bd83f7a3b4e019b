"""Weights that optimize() stores otherwise: e4m3, and the copy in oneDNN's layout."""

import pickle
import re

import pytest
import torch
from tiny_families import assert_close, logits, sparse
from torch import nn

import nm_act
from nm_act.layers.linear import NMLinear
from nm_act.ops import prepack
from nm_act.optimize import model as model_module
from nm_act.optimize.eligible import unfit_for_fp8
from nm_act.optimize.model import is_optimized


def layer_of(*spec, **fields) -> NMLinear:
    return NMLinear.from_linear(torch.nn.Linear(64, 48), nm_act.LinearSpec(*spec, **fields))


class TestFP8:
    @pytest.mark.parametrize("name", ["llama", "qwen2"])
    def test_stores_a_byte_a_weight_and_stays_near(self, name):
        model = sparse(name, "8:16")
        expected = logits(model)
        report = nm_act.optimize(model, fp8="decode")
        assert len(report.fp8) == 8
        layers = [module for module in model.modules() if isinstance(module, nm_act.FP8Linear)]
        assert all(layer.rows.numel() == layer.in_features * layer.out_features for layer in layers)
        assert all(layer.codes is None for layer in layers)
        error = (logits(model) - expected).norm() / expected.norm()
        assert 1e-4 < error < 0.1

    def test_equals_the_layer_with_the_rounded_weight(self):
        linear = torch.nn.Linear(64, 48)
        layer = NMLinear.from_linear(linear, nm_act.LinearSpec("8:16", mitigation=("var", "dpts-mean")))
        fp8 = nm_act.FP8Linear(layer, "decode")
        scale = linear.weight.abs().amax(dim=1) / 448
        rounded = (linear.weight / scale[:, None]).to(torch.float8_e4m3fn).float() * scale[:, None]
        layer.load_state_dict({"weight": rounded, "bias": linear.bias})
        for tokens in (1, 5, 40):
            x = torch.randn(tokens, 64)
            assert_close(fp8(x), layer(x), atol=1e-4)

    def test_checkpoints_are_stock_and_load(self):
        model = sparse("qwen2")
        names = set(model.state_dict())
        nm_act.optimize(model, fp8="decode")
        state = model.state_dict()
        assert set(state) == names
        expected = logits(model)
        model.load_state_dict(state)  # rounded already: nothing changes
        assert_close(logits(model), expected, atol=1e-5)

    @pytest.mark.parametrize("layout", ["decode", "both"])
    def test_loading_reports_names_as_torch_does(self, layout):
        layer = layer_of("8:16")
        stock, fp8 = torch.nn.Linear(64, 48), nm_act.FP8Linear(layer, layout)
        weight, bias = fp8.dequantised(torch.float32), fp8.bias.detach().clone()
        full = torch.nn.Linear(64, 48).state_dict()
        for state in (
            {},
            {"weight": full["weight"]},
            {"bias": full["bias"]},
            full | {"shift": torch.ones(64)},
            full | {"scale.weight": torch.ones(64)},
        ):
            found = fp8.load_state_dict(state, strict=False)
            expected = stock.load_state_dict(state, strict=False)
            assert sorted(found.missing_keys) == sorted(expected.missing_keys)
            assert found.unexpected_keys == expected.unexpected_keys
            if found.missing_keys or found.unexpected_keys:
                with pytest.raises(RuntimeError, match=(found.missing_keys + found.unexpected_keys)[0]):
                    fp8.load_state_dict(state)
        assert not torch.equal(fp8.dequantised(torch.float32), weight)
        assert torch.equal(fp8.bias, full["bias"])
        assert not torch.equal(bias, full["bias"])
        with pytest.raises(RuntimeError, match=r"expected bias of shape \[48\], got \[1\]"):
            fp8.load_state_dict(full | {"bias": torch.ones(1)})
        alone = nm_act.FP8Linear(NMLinear.from_linear(nn.Linear(64, 48, bias=False), layer.spec), layout)
        assert alone.load_state_dict(full, strict=False).unexpected_keys == ["bias"]

    def test_a_model_reports_the_missing_bias_of_a_merged_layer(self):
        model = sparse("qwen2", "8:16")  # q, k and v have biases
        nm_act.optimize(model, fp8="decode")
        state = model.state_dict()
        lost = [name for name in state if name.endswith(("layers.0.self_attn.k_proj.bias", "0.mlp.down_proj.weight"))]
        for name in lost:
            state.pop(name)
        assert len(lost) == 2
        assert sorted(model.load_state_dict(state, strict=False).missing_keys) == sorted(lost)

    def test_follows_the_dtype_but_keeps_its_bytes_and_scales(self):
        fp8 = nm_act.FP8Linear(layer_of("2:4"), "decode").bfloat16()
        assert (fp8.rows.dtype, fp8.weight_scale.dtype) == (torch.uint8, torch.float32)
        assert fp8.weight.dtype == torch.bfloat16
        assert fp8(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16

    @pytest.mark.parametrize("criterion", ["act", "wina"])
    def test_scores_and_row_sums_follow_a_loaded_weight(self, criterion):
        fp8 = nm_act.FP8Linear(layer_of("2:4", criterion, ("dpts-mean",)), "decode")
        other = torch.nn.Linear(64, 48)
        with torch.no_grad():
            other.weight[:, ::3] *= 20
        fp8.load_state_dict(other.state_dict())
        stored = fp8.to_nm_linear()  # its vectors come from the dequantised weight
        x = torch.randn(9, 64)
        assert_close(fp8(x), stored(x), atol=1e-4)
        for name in ("channel_scale", "shift_out"):
            assert (getattr(fp8, name) is None) == (getattr(stored, name) is None)
            if getattr(stored, name) is not None:
                torch.testing.assert_close(getattr(fp8, name), getattr(stored, name))

    def test_top_k_stays_in_16_bits(self):
        rules = [nm_act.Rule(projections=["down_proj"], pattern="8:16")]
        model = sparse(pattern="50%", rules=rules)
        expected = logits(model)
        report = nm_act.optimize(model, fp8="decode")
        assert report.fp8 == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
        assert dict(report.kept)["model.layers.0.self_attn.o_proj"] == "stays in 16 bits: 50% act"
        assert (logits(model) - expected).norm() < 0.1 * expected.norm()

    @pytest.mark.parametrize(
        ("layout", "spec", "why"),
        [
            ("prefill", {"pattern": "8:16", "mitigation": ["var"]}, "8:16 act var (unfused method 8:16 act var)"),
            ("both", {"pattern": "8:16", "criterion": "wina"}, "8:16 wina (a channel scale (wina))"),
            ("both", {"pattern": "2:4", "phase": "decode"}, "(dense in prefill)"),
            ("both", {"pattern": "2:4+1"}, "2:4+1 act (unfused method 2:4+1 act)"),
            ("decode", {"pattern": "50%"}, "50% act (50% act)"),
            ("decode", {"pattern": "8:16", "criterion": "clact"}, "8:16 clact (8:16 clact)"),
            ("decode", {"pattern": "8:16", "criterion": "weight-magnitude"}, "(8:16 weight-magnitude)"),
            ("decode", {"pattern": "8:16", "mitigation": ["spts"]}, "8:16 act spts (8:16 act spts)"),
            ("decode", {"pattern": "8:16", "phase": "prefill"}, "(dense in decode)"),
        ],
    )
    def test_the_constructor_takes_what_it_computes(self, layout, spec, why):
        sentence = f"expected a layer whose weight can be e4m3 for {layout}, got .*{re.escape(why)}; keep it in 16 bits"
        with pytest.raises(ValueError, match=sentence):
            nm_act.FP8Linear(layer_of(**spec), layout)

    def test_the_constructor_knows_its_layouts_and_layers(self):
        with pytest.raises(ValueError, match="expected fp8 among prefill, decode, both, got 'in_out'"):
            nm_act.FP8Linear(layer_of("2:4"), "in_out")
        with pytest.raises(TypeError, match="expected an NMLinear, got Linear"):
            nm_act.FP8Linear(torch.nn.Linear(64, 48), "decode")

    def test_prefill_storage_needs_cuda(self):
        model = sparse()
        with pytest.raises(ValueError, match='expected a model on CUDA for fp8="prefill", got one on cpu; move it'):
            nm_act.optimize(model, fp8="prefill")
        assert not is_optimized(model)

    def test_prefill_storage_needs_fp8_tensor_cores(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
        sentence = re.escape(
            'expected compute capability 9.0 for fp8="both", whose products run on its fp8 tensor cores'
        )
        with pytest.raises(ValueError, match=f"{sentence}, got 8.0; choose"):
            model_module._check_prefill_device(torch.device("cuda"), "both")

    @pytest.mark.parametrize(
        ("pattern", "dtype", "why"),
        [
            ("8:16", torch.float16, "8:16 in float16"),
            ("2:4", torch.float16, ""),
            ("8:16", torch.bfloat16, ""),
            ("2:4", torch.float32, "2:4 in float32"),
        ],
    )
    def test_prefill_storage_needs_a_dtype_of_its_products(self, pattern, dtype, why):
        layer = NMLinear(64, 48, spec=nm_act.LinearSpec(pattern), device="meta", dtype=dtype)
        assert [unfit_for_fp8(layer, layout) for layout in ("prefill", "both", "decode")] == [why, why, ""]

    def test_calibrated_layers_stay_in_16_bits(self):
        model = sparse(pattern="8:16")
        model.model.layers[0].mlp.down_proj.register_buffer("shift", torch.ones(96))
        report = nm_act.optimize(model, fp8="decode")
        assert dict(report.kept)["model.layers.0.mlp.down_proj"] == "stays in 16 bits: 8:16 act"
        assert len(report.fp8) == 7

    def test_prefill_storage_takes_what_fp8_tensor_cores_multiply(self, monkeypatch):
        monkeypatch.setattr(model_module, "_check_prefill_device", lambda device, fp8: None)
        rules = [nm_act.Rule(projections=["down_proj"], pattern="8:16")]
        rules += [nm_act.Rule(projections=["o_proj"], pattern="2:4+1")]
        model = sparse(rules=rules)
        report = nm_act.optimize(model, fp8="prefill")
        assert dict(report.kept)["model.layers.0.self_attn.o_proj"] == "stays in 16 bits: unfused method 2:4+1 act"
        assert len(report.fp8) == 6

    @pytest.mark.parametrize("patterns", [("8:16", None), ("2:4", "8:16")])
    def test_both_copies_hold_the_same_weight_and_load(self, patterns):
        fp8 = nm_act.FP8Linear(layer_of(patterns[0], decode_pattern=patterns[1]), "both")
        bytes_of = [buffer.numel() * buffer.element_size() for buffer in (fp8.codes, fp8.rows)]
        assert sum(bytes_of) == 2 * 64 * 48  # those of the 16-bit weight
        assert torch.equal(fp8.codes.t(), fp8.rows)
        other = torch.nn.Linear(64, 48)
        fp8.load_state_dict(other.state_dict())
        assert torch.equal(fp8.codes.t(), fp8.rows)
        again = pickle.loads(pickle.dumps(fp8))
        x = torch.randn(3, 1, 64)
        assert torch.equal(again(x), fp8(x))
        expected = nm_act.prune(x, patterns[1] or patterns[0]) @ fp8.weight.t() + other.bias
        assert_close(fp8(x), expected, atol=1e-4)

    @torch.no_grad()
    def test_compiles_into_one_graph_and_follows_replaced_buffers(self):
        fp8 = nm_act.FP8Linear(layer_of("8:16", "wina", ("var", "dpts-mean")), "decode").bfloat16()
        compiled = torch.compile(fp8, fullgraph=True, dynamic=True, backend="eager")
        for tokens in (1, 3, 40):  # never called eagerly before
            x = torch.randn(tokens, 64, dtype=torch.bfloat16)
            y = compiled(x)
            assert torch.equal(y, fp8(x))
        fp8.weight_scale = 2 * fp8.weight_scale  # as accelerate moves buffers
        fp8.shift_out = 2 * fp8.shift_out
        fp8.bias = torch.nn.Parameter(2 * fp8.bias)
        assert torch.equal(fp8(x), 2 * y)
        assert fp8.work() is fp8.work()

    def test_pickles_of_0_2_load(self):
        fp8 = nm_act.FP8Linear(layer_of("8:16"), "decode")
        expected = fp8(torch.ones(1, 64))
        state = fp8.__dict__ | {"_buffers": {**fp8._buffers, "codes": fp8.rows}}
        del state["_buffers"]["rows"]
        old = nm_act.FP8Linear.__new__(nm_act.FP8Linear)
        old.__setstate__(state)
        assert torch.equal(old(torch.ones(1, 64)), expected)


# ---- weights in oneDNN's layout


@torch.no_grad()
def test_prepack_keeps_the_outputs_and_says_its_bytes():
    if prepack.why_not_prepacked(torch.empty(1)):
        pytest.skip("this torch was built without oneDNN")
    model = sparse("llama", "8:16")
    expected = logits(model)
    report = nm_act.optimize(model, prepack=True)
    layers = [layer for layer in model.modules() if isinstance(layer, nm_act.NMLinear)]
    assert len(report.prepacked) == len(layers) == 8  # per layer: merged q/k/v, o, merged gate/up, down
    assert report.prepacked_bytes == sum(layer.weight.nbytes for layer in layers)
    assert "prepacked for oneDNN: 8, a second copy of" in str(report)
    assert all(layer.prepacked_weight is not None for layer in layers)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected a model that is not optimized"):
        nm_act.optimize(model)
    nm_act.deoptimize(model)
    assert not any(layer.prepack for layer in model.modules() if isinstance(layer, nm_act.NMLinear))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_prepack_refuses_a_dense_model_and_says_what_stays():
    with pytest.raises(ValueError, match="expected a sparse model for prepack, got a dense one"):
        nm_act.optimize(nn.ModuleList([nn.Linear(32, 32)]), prepack=True)
    layer = nm_act.NMLinear.from_linear(nn.Linear(32, 32), nm_act.LinearSpec("8:16")).double()
    report = nm_act.optimize(nn.ModuleList([layer]), prepack=True)
    assert report.kept[-1] == ("0", "not prepacked: oneDNN has no product in float64 on this processor")
