"""A few random layers of every family that optimize() knows, and of one that it does not: dense, sparse, compared."""

import pytest
import torch

import nm_act
from nm_act.optimize.families import FAMILIES, PRE_NORM

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KNOWN = list(FAMILIES)
PLAIN = [name for name, known in FAMILIES.items() if known.norms == PRE_NORM]
IDS = torch.arange(3, 27).view(2, 12)


def family(name: str = "llama", *, std: float | None = None, **changes):
    """A model in evaluation mode, float32, the same at every call; matrices of this std show every method in the logits."""
    transformers = pytest.importorskip("transformers")

    prefix = {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "gemma3": "Gemma3",
        "phi3": "Phi3",
    }[name]
    sizes = dict(SIZES)
    if name == "gemma3":
        sizes |= {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
        sizes |= {"layer_types": ["sliding_attention", "full_attention"]}
    if name == "mistral":
        sizes["sliding_window"] = 8
    if name == "qwen3":
        sizes["head_dim"] = 32
    sizes |= changes
    config_name = f"{prefix}TextConfig" if name == "gemma3" else f"{prefix}Config"
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, config_name)(**sizes))
    # Biases and norms start as constants, which would hide a mixed-up one.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif std is not None:
                parameter.normal_(std=std)
    return model.eval()


@torch.no_grad()
def decide(model):
    """Let two channels of every four be 50 times the others wherever the model prunes, and return it.

    Then rounding decides next to no selection, and results in 16 bits can be compared: one activation that is pruned in
    one of two runs makes more of a difference than all roundings together.
    """
    for layer in model.get_decoder().layers:
        norms = [module for name, module in layer.named_children() if "norm" in name]
        vectors = [norm.weight for norm in norms]
        vectors += [
            row for name in ("self_attn.v_proj", "mlp.up_proj") for row in layer.get_submodule(name).parameters()
        ]
        for vector in vectors:
            small = torch.arange(vector.shape[0]) % 4 >= 2
            one_plus = "Gemma" in type(layer).__name__ and any(vector is norm.weight for norm in norms)
            vector[small] = -0.98 if one_plus else 0.02 * vector[small]
    return model


def sparse(name: str = "llama", pattern: str = "2:4", **fields):
    """A family's model with the recipe of these fields."""
    model = family(name)
    nm_act.sparsify(model, nm_act.Recipe(pattern, **fields))
    return model


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    """Of IDS, without a cache, unless the inputs say otherwise."""
    return model(**({"input_ids": IDS, "use_cache": False} | inputs)).logits


def assert_close(actual, expected, *, atol: float = 2e-5, rtol: float = 1e-4) -> None:
    """Equal but for the order of float32 sums."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def optimize_checked(model, **inputs) -> nm_act.OptimizeReport:
    """The report of optimize(), after which the model gives the same logits."""
    expected = logits(model, **inputs)
    report = nm_act.optimize(model)
    assert_close(logits(model, **inputs), expected)
    return report


def sparse_layers(model) -> list[nm_act.NMLinear]:
    return [module for module in model.modules() if isinstance(module, nm_act.NMLinear)]
