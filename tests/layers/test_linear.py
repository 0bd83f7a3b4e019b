"""NMLinear: arithmetic against the oracle, parameters, derived buffers, phases, compilation."""

import copy
import itertools
import pickle
import re

import pytest
import torch
from torch import nn

import nm_act
from nm_act import reference
from nm_act.layers.linear import NMLinear
from nm_act.methods import criteria
from nm_act.patterns import NMPattern
from nm_act.recipe import LinearSpec

FULL = LinearSpec("8:16", "wina", ("var", "dpts-mean"))


def _dense(features=64, out=24, bias=True, dtype=torch.float32, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(features, out, bias=bias, dtype=dtype)


def _oracle(x, dense, spec):
    return reference.sparse_linear(
        x,
        dense.weight,
        dense.bias,
        spec.pattern.keep,
        spec.pattern.group,
        channel_scale=criteria.channel_scale(spec.criterion, dense.weight),
        token_shift=spec.token_shift,
        variance_correction=spec.variance_correction,
    ).to(x.dtype)


SPECS = [
    LinearSpec("2:4"),
    LinearSpec("16:32", "amber"),
    LinearSpec("4:8", "variance", ("var",)),
    LinearSpec("8:16", mitigation=("dpts-median",)),
    FULL,
]


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (2, 5, 64), (0, 64)], ids=str)
def test_forward_equals_the_oracle(spec, layout, bias, shape):
    dense = _dense(bias=bias)
    layer = NMLinear.from_linear(copy.deepcopy(dense), spec, weight_layout=layout)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), _oracle(x, dense, spec), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_in_half_precision(dtype):
    dense = _dense(dtype=dtype)
    x = torch.randn(4, 64, dtype=dtype)
    layer = NMLinear.from_linear(copy.deepcopy(dense), FULL)
    torch.testing.assert_close(layer(x), _oracle(x, dense, FULL), rtol=2e-2, atol=2e-2)
    assert layer.channel_scale.dtype == layer.shift_out.dtype == torch.float32


def test_the_dense_layer_keeps_its_storage():
    dense = _dense()
    strides, address = dense.weight.stride(), dense.weight.data_ptr()
    layer = NMLinear.from_linear(dense, FULL)
    assert (dense.weight.stride(), dense.weight.data_ptr()) == (strides, address)
    assert layer.weight.t().is_contiguous()


@torch.no_grad()
def test_autocast_casts_as_the_dense_layer_does():
    dense, x = _dense(), torch.randn(3, 64)
    layer = NMLinear.from_linear(dense, FULL)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == dense(x).dtype == torch.bfloat16
        assert layer(y.new_zeros(3, 64)).dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=5e-2)


def test_parameters_are_taken_over():
    dense = _dense().eval()
    dense.weight.requires_grad_(False)
    layer = NMLinear.from_linear(dense, FULL)
    assert torch.equal(layer.weight, dense.weight)
    assert layer.bias is dense.bias
    assert not layer.training
    assert not layer.weight.requires_grad
    assert NMLinear.from_linear(dense, FULL, weight_layout="out_in").weight is dense.weight
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert back.weight is layer.weight
    assert back.bias is dense.bias
    assert not back.training
    assert NMLinear.from_linear(_dense(bias=False), FULL).to_linear().bias is None


@pytest.mark.parametrize(("layout", "transposed"), [("in_out", True), ("out_in", False)])
def test_weight_layout(layout, transposed):
    dense = _dense()
    before = dense.weight.detach().clone()
    layer = NMLinear.from_linear(dense, LinearSpec("2:4"), weight_layout=layout)
    assert layer.weight.shape == (24, 64)
    assert torch.equal(layer.weight, before)
    assert layer.weight.t().is_contiguous() is transposed


def test_state_dict_is_the_dense_one():
    dense = _dense()
    expected = copy.deepcopy(dense.state_dict())
    layer = NMLinear.from_linear(dense, FULL)
    assert list(layer.state_dict()) == list(expected) == ["weight", "bias"]
    for key, value in layer.state_dict().items():
        assert torch.equal(value, expected[key])
    nn.Linear(64, 24).load_state_dict(layer.state_dict())


def _check_derived(layer):
    assert layer.weight.t().is_contiguous()
    weight = layer.weight.detach()
    assert torch.equal(layer.channel_scale, criteria.channel_scale("wina", weight))
    torch.testing.assert_close(layer.shift_out, weight.double().sum(dim=1).float(), rtol=0, atol=0)
    assert layer.channel_scale.dtype == layer.shift_out.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_derived_buffers_follow_load_state_dict(assign):
    layer = NMLinear(64, 24, spec=FULL)
    other = _dense(seed=1)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(layer.weight, other.weight)
    _check_derived(layer)
    nested = nn.Sequential(NMLinear(64, 24, spec=FULL))
    nested.load_state_dict(nn.Sequential(other).state_dict(), assign=assign)
    _check_derived(nested[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.double().float(),
        lambda layer: nn.Sequential(layer).half()[0],
        copy.deepcopy,
        lambda layer: copy.deepcopy(layer.to(torch.bfloat16)),
    ],
    ids=["bfloat16", "float64", "half in a parent", "deepcopy", "both"],
)
def test_derived_buffers_follow_conversions(change):
    _check_derived(change(NMLinear.from_linear(_dense(), FULL)))


@pytest.mark.parametrize("assign", [False, True])
def test_meta_then_load(assign):
    layer = NMLinear(64, 24, spec=FULL, device="meta")
    assert layer.channel_scale is None
    if not assign:
        layer = layer.to_empty(device="cpu")
    dense = _dense()
    layer.load_state_dict(dense.state_dict(), assign=assign)
    _check_derived(layer)
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), _oracle(x, dense, FULL), rtol=1e-4, atol=1e-5)


def test_refresh_follows_a_change_in_place():
    layer = NMLinear.from_linear(_dense(), FULL)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    layer.refresh()
    _check_derived(layer)


@torch.no_grad()
@pytest.mark.parametrize("phase", ["both", "prefill", "decode"])
@pytest.mark.parametrize(
    ("shape", "is_decode"), [((64,), True), ((1, 64), True), ((3, 1, 64), True), ((2, 64), False), ((1, 2, 64), False)]
)
def test_phase(phase, shape, is_decode):
    dense = _dense()
    layer = NMLinear.from_linear(copy.deepcopy(dense), LinearSpec("2:4", phase=phase))
    x = torch.randn(shape)
    sparse = phase == "both" or (phase == "decode") == is_decode
    expected = _oracle(x, dense, layer.spec) if sparse else dense(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert sparse is not torch.allclose(layer(x), dense(x), atol=1e-3)


def test_repr_shows_the_spec():
    assert repr(NMLinear(64, 24, spec=FULL)) == (
        "NMLinear(in_features=64, out_features=24, bias=True, 8:16 wina var dpts-mean)"
    )


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (ValueError, "expected in_features to be a multiple of the group 16, got 24; choose", lambda: NMLinear(24, 8, spec=LinearSpec("8:16"))),
        (ValueError, "multiple of the group 32, got 48", lambda: NMLinear.from_linear(nn.Linear(48, 8), LinearSpec("16:32"))),
        (ValueError, "expected in_features to be a multiple of the group 16, got 24", lambda: NMLinear(24, 8, spec=LinearSpec("2:4+1"))),
        (ValueError, "expected a weight layout among in_out, out_in, got 'blocked'", lambda: NMLinear(64, 8, spec=FULL, weight_layout="blocked")),
        (TypeError, "expected a torch.nn.Linear, got NMLinear; pass the dense layer", lambda: NMLinear.from_linear(NMLinear(64, 8, spec=FULL), FULL)),
        (ValueError, 'expected lift to be True, False or "auto", got 1.5', lambda: NMLinear(64, 8, spec=LinearSpec("2:4+1"), lift=1.5)),
        *[
            (ValueError, f"expected 2:4+1 to lift the weight for, got {pattern}", lambda pattern=pattern: NMLinear(64, 8, spec=LinearSpec(pattern), lift=True))
            for pattern in ("8:16", "2:4", "2:4+2", "50%")
        ],
    ],
)  # fmt: skip
def test_what_no_layer_is_made_of(error, sentence, call):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


def test_a_weight_that_comes_after_the_layer_gives_the_same_output():
    layer, x = NMLinear(64, 24, spec=FULL, device="meta"), torch.randn(2, 64)
    layer.weight, layer.bias = _dense().weight, _dense().bias
    torch.testing.assert_close(layer(x), NMLinear.from_linear(_dense(), FULL)(x))


def test_a_backward_pass_gives_the_gradient_of_the_masked_dense_layer():
    dense, x = _dense(), torch.randn(2, 64, requires_grad=True)
    layer = NMLinear.from_linear(copy.deepcopy(dense), LinearSpec("2:4"))
    layer(x).square().sum().backward()
    masked = (x.detach() * reference.selection_mask(x.detach(), nm_act.NMPattern("2:4"))).requires_grad_()
    dense(masked).square().sum().backward()
    torch.testing.assert_close(x.grad, masked.grad * (masked != 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad.stride() == layer.weight.stride()


@torch.no_grad()
@pytest.mark.parametrize("spec", [LinearSpec("8:16"), FULL, LinearSpec("2:4", phase="prefill")], ids=str)
def test_compile_gives_one_graph_for_any_batch_size(spec):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = NMLinear.from_linear(_dense(), spec)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for batch, tokens in itertools.product((2, 3, 7), (4, 9)):
        x = torch.randn(batch, tokens, 64)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# ---- patterns with windows, lifted weights ------------------------------------------------------------------------------
def _is_lifted(layer) -> bool:
    lifted = layer.lifted_weight
    expected = nm_act.lift_weight(layer.weight.detach(), layer.spec.pattern)
    return torch.equal(lifted, expected) and lifted.data_ptr() == layer.weight.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("lift", ["auto", True, False])
@pytest.mark.parametrize("pattern", ["2:4+1", "2:4+2@1,3"])
@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 64)])
def test_windows_equal_the_oracle(layout, lift, pattern, shape):
    dense, spec, x = _dense(), LinearSpec(pattern, "wina", ("var",)), torch.randn(shape)
    liftable = pattern == "2:4+1"
    lift = lift if liftable or lift is not True else "auto"
    layer = NMLinear.from_linear(copy.deepcopy(dense), spec, weight_layout=layout, lift=lift)
    assert (layer.lifted_weight is not None) is (lift is True)
    exact = reference.sparse_linear(
        x,
        dense.weight,
        dense.bias,
        extra_columns=spec.pattern.extra_columns,
        channel_scale=criteria.channel_scale("wina", dense.weight),
        variance_correction=True,
    )
    torch.testing.assert_close(layer(x), exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_the_lifted_weight_follows_every_change(layout):
    layer = NMLinear.from_linear(_dense(), LinearSpec("2:4+1"), weight_layout=layout, lift=True)
    assert _is_lifted(layer)
    assert _is_lifted(layer.to(torch.bfloat16))
    assert _is_lifted(copy.deepcopy(layer))
    assert _is_lifted(pickle.loads(pickle.dumps(layer)))
    layer.load_state_dict(_dense(seed=3).state_dict())
    assert _is_lifted(layer)
    layer.load_state_dict(_dense(seed=4).state_dict(), assign=True)
    assert _is_lifted(layer)
    layer.weight = _dense().weight
    assert layer.lifted_weight is None
    layer.refresh()
    assert _is_lifted(layer)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_a_lifted_layer_saves_the_dense_weight(layout, tmp_path):
    from safetensors.torch import load_file, save_file

    dense = _dense()
    layer = NMLinear.from_linear(copy.deepcopy(dense), LinearSpec("2:4+1"), weight_layout=layout, lift=True)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert len(list(layer.parameters())) == 2
    state = layer.state_dict()
    assert state["weight"].untyped_storage().nbytes() == 24 * 64 * 4
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "layer.safetensors")
    for name, value in load_file(tmp_path / "layer.safetensors").items():
        assert torch.equal(value, dense.state_dict()[name])


@torch.no_grad()
def test_a_lifted_layer_compiles_to_one_graph():
    layer = NMLinear.from_linear(_dense(), LinearSpec("2:4+1"), lift=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(5, 64)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("phase", ["both", "prefill"])
def test_an_input_of_another_kind_or_dtype_is_our_sentence(phase):
    layer = NMLinear.from_linear(nn.Linear(16, 8), LinearSpec("2:4", phase=phase))
    x = torch.randn(1, 16)
    told = (
        r"expected x in the dtype of the layer's weight, torch.float32, got torch.bfloat16; convert one of them, or run"
    )
    with pytest.raises(TypeError, match=told):
        layer(x.bfloat16())
    with pytest.raises(TypeError, match=r"expected x as a torch.Tensor, got ndarray; convert it with torch.as_tensor"):
        layer(x.numpy())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_pattern_alone_is_a_spec():
    dense = nn.Linear(32, 8)
    for layer in (NMLinear.from_linear(dense, "8:16"), NMLinear(32, 8, spec=NMPattern("8:16"))):
        assert layer.spec == LinearSpec("8:16")
    with pytest.raises(ValueError, match='expected a pattern written "N:M"'):
        NMLinear.from_linear(dense, "half")
    with pytest.raises(
        TypeError, match="expected a weight in float32, bfloat16 or float16, got float64; convert the layer"
    ):
        NMLinear.from_linear(dense.double(), "8:16")
