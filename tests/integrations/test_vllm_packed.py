"""A served layer over prepacked weights, without vLLM: one call for all segments gives what a call for each gives."""

import pytest
import torch
from conftest import needs_onednn

from nm_act import LinearSpec
from nm_act.integrations.vllm_operands import Operands
from nm_act.integrations.vllm_packed import PackedCall, Prepacked
from nm_act.integrations.vllm_plan import Segment
from nm_act.ops.prepack import prepack_weight

FEATURES, SIZES = 64, (48, 32, 16)


def specs_and_data(kind, generator):
    """Of three segments: sparse, dense, sparse with more than a pattern."""

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    plain, data = LinearSpec("8:16"), {}
    if kind == "var":
        other = LinearSpec("2:4", mitigation=["var"])
    elif kind == "shifts":
        other, data = LinearSpec("2:4", mitigation=["dpts-mean", "ls"]), {"column_scale": random(SIZES[2]).exp()}
    elif kind == "bias":
        other, data = LinearSpec("4:8"), {"added_bias": random(SIZES[2])}
    elif kind == "low rank":
        other = LinearSpec("4:8", mitigation=["rsparse-4"])
        data = {"low_rank_in": random(4, FEATURES), "low_rank_out": random(SIZES[2], 4)}
    else:
        other, data = (
            LinearSpec("4:8", mitigation=["larosa"]),
            {"rotation": torch.linalg.qr(random(FEATURES, FEATURES))[0]},
        )
    return [(plain, {}), (None, {}), (other, data)]


def operands(kind, seed, prepack):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(sum(SIZES), FEATURES, generator=generator)
    segments, start = [], 0
    for size, (spec, data) in zip(SIZES, specs_and_data(kind, generator), strict=True):
        segments.append(Segment(start, start + size, spec, None, data))
        start += size
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    copy = (lambda part: Prepacked(prepack_weight(part))) if prepack else None
    return Operands.of(parameter, segments, None, prepack=copy)


@torch.inference_mode()
@needs_onednn
@pytest.mark.parametrize("kind", ["var", "shifts", "bias", "low rank", "rotation"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias of the layer"])
def test_outputs_before_and_after_a_reload(kind, biased):
    served = operands(kind, 0, prepack=True)
    joined = kind not in ("low rank", "rotation")
    assert len(served.calls) == len(served.products) == (1 if joined else len(SIZES))
    bias = torch.randn(sum(SIZES)) if biased else None
    for seed in (0, 1):
        if seed:
            served.copy_(operands(kind, seed, prepack=True))
        expected = operands(kind, seed, prepack=False)
        for tokens in (1, 3, 9):
            x = torch.randn(tokens, FEATURES)
            y = served.run(x, served.parameter, bias)
            torch.testing.assert_close(y, expected.run(x, expected.parameter, bias), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@needs_onednn
def test_no_tokens_and_a_compiled_call():
    served = operands("var", 0, prepack=True)
    (call,) = served.calls
    assert isinstance(call, PackedCall)
    assert call(torch.empty(0, FEATURES), None, None).shape == (0, sum(SIZES))

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(x):
        return call(x, None, None) + 1

    for seed in (0, 1):  # after a reload the graph reads the new weights
        if seed:
            served.copy_(operands("var", seed, prepack=True))
        expected = operands("var", seed, prepack=False)
        for tokens in (2, 5):
            x = torch.randn(tokens, FEATURES)
            torch.testing.assert_close(run(x), expected.run(x, expected.parameter, None) + 1, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@needs_onednn
def test_refusals():
    (call,) = operands("var", 0, prepack=True).calls
    x = torch.randn(2, FEATURES)
    for wrong in (torch.zeros(1, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.zeros(1)):
        with pytest.raises(ValueError, match=r"expected (a layer as one int64|the address of a PackedLayer)"):
            torch.ops.nm_act._packed_layer(x, wrong, sum(SIZES))
    for wrong in (x[:, 1:], x.double()):
        with pytest.raises(ValueError, match=rf"expected x of {FEATURES} features in torch\.float32"):
            call(wrong, None, None)
    with pytest.raises(ValueError, match="expected a bias of shape"):
        call(x, None, torch.zeros(sum(SIZES) + 1))
    half = torch.randn(sum(SIZES)).bfloat16()
    assert torch.equal(call(x, None, half), call(x, None, half.float()))


@needs_onednn
def test_a_gradient_is_refused():
    (call,) = operands("var", 0, prepack=True).calls
    y = call(torch.randn(2, FEATURES, requires_grad=True), None, None)
    with pytest.raises(RuntimeError, match="expected no gradient through nm_act::_packed_layer"):
        y.sum().backward()
