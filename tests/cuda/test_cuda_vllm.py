"""The plug-in's vLLM layers on a GPU, without an engine: captured into CUDA graphs as vLLM does, reloaded, compiled."""

import pytest
import torch
import vllm_standin
from cuda_cases import GPU_MARKS, IS_HOPPER, poison

import nm_act

pytestmark = GPU_MARKS

FEATURES = 512
TOKENS = (1, 2, 4, 5, 8, 64, 600)
CASES = [(pattern, fp8, "act") for pattern in ("2:4", "8:16") for fp8 in (None, "prefill", "decode", "both")]
CASES += [("8:16", None, "wina"), ("8:16", "decode", "wina"), ("2:4", "both", "wina")]


@pytest.fixture
def served(request):
    """Layers of a case on the GPU, with the weights of seed 0."""
    pattern, fp8, criterion = request.param
    if fp8 in ("prefill", "both") and not IS_HOPPER:
        pytest.skip("e4m3 needs compute capability 9")
    recipe = nm_act.Recipe(pattern, criterion=criterion).to_dict()
    with vllm_standin.plugin() as module, pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_standin.PLATFORM, "device_type", "cuda")
        patch.setattr(vllm_standin.PLATFORM, "get_device_capability", torch.cuda.get_device_capability)
        config = module.NMActVLLMConfig.from_config({"recipe": recipe} | ({} if fp8 is None else {"fp8": fp8}))
        layers = vllm_standin.layers(config, FEATURES, torch.bfloat16, "cuda")
        for layer in layers.values():
            layer.load(vllm_standin.weights(layer, 0))
        yield config, layers


def activation(tokens):
    return torch.randn(tokens, FEATURES, device="cuda", dtype=torch.bfloat16)


def expected(config, layer, seed, x):
    """What nm_act's own layers compute from the same weights: one for each of the layer's products."""
    (spec,) = {str(spec): spec for spec in layer.quant_method.specs}.values()
    return vllm_standin.own(layer, spec, config.storage.fp8, seed, merged=spec.criterion == "act")(x)


@pytest.mark.parametrize("served", CASES, indirect=True, ids=str)
@torch.inference_mode()
def test_layers_equal_our_own(served):
    config, layers = served
    for tokens in TOKENS:
        x = activation(tokens)
        poison()
        for name, layer in layers.items():
            assert torch.equal(layer(x), expected(config, layer, 0, x)), (name, tokens)


def _warm_up(layer, x):
    """As vLLM does before it captures; a host sync that torch knows is an error."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("served", CASES, indirect=True, ids=str)
@torch.no_grad()
def test_captured_layers_follow_their_input_and_a_reload(served):
    """Capture refuses a host sync and an allocation past torch's; poisoned memory shows a buffer outside the graph."""
    config, layers = served
    for name, layer in layers.items():
        for tokens in TOKENS:
            x = activation(tokens)
            _warm_up(layer, x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            assert y.shape == (tokens, layer.output_size)
            for seed in (0, 1, 0):
                layer.load(vllm_standin.weights(layer, seed))
                x.copy_(activation(tokens))
                poison()
                graph.replay()
                assert torch.equal(y, expected(config, layer, seed, x)), (name, tokens, seed)


@pytest.mark.parametrize(
    "served", [("8:16", "both", "act"), ("2:4", "both", "act"), ("8:16", None, "act")], indirect=True
)
@torch.inference_mode()
def test_one_compiled_graph_for_any_number_of_tokens(served, graphs):
    """The copy of the weight is chosen as the graph runs: compiled with many tokens, one token still skips rows."""
    _, layers = served
    layer = layers["gate_up_proj"]
    compiled = torch.compile(layer, backend=graphs.backend, fullgraph=True, dynamic=True)
    for tokens in (600, 8, 3, 2):
        x = activation(tokens)
        assert torch.equal(compiled(x), layer(x)), tokens
    assert len(graphs) == 1


@pytest.mark.parametrize("served", [("8:16", "both", "act")], indirect=True)
def test_weights_take_the_bytes_of_the_16_bit_ones(served):
    _, layers = served
    for layer in layers.values():
        held = sum(each.nbytes for each in (layer.weight, *layer.nm_act_operands.tensors()))
        assert held == 2 * layer.input_size * layer.output_size + 4 * layer.output_size
