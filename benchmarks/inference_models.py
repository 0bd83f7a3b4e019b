"""The models of bench_inference.py: their shapes, their modes, and the dense baselines at their best."""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import nm_act
from nm_act.ops.e4m3 import quantise_rows
from nm_act.optimize import fused

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
_QWEN = {"model_type": "qwen2", "vocab_size": 152064, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}

CONFIGS = {
    "llama-3.2-1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama-3-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    "qwen2.5-7b": _QWEN
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4},
    "gemma-3-4b": {"model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240}
    | {"num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    | {"sliding_window": 1024},
    "tiny": _LLAMA
    | {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}
"""Shapes of published models, and one for tests."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a model runs: ``dense_bf16`` and ``dense_fp8`` are the baselines, everything else is sparse.

    ``fp8`` is None, or the phases that the e4m3 weights are stored for; of dense weights it is "prefill".
    ``head`` is what the output head is stored as, or None.
    """

    name: str
    recipe: nm_act.Recipe | None
    fp8: str | None = None
    head: str | None = None


def parse_modes(names: list[str]) -> list[Mode]:
    """Modes by name, baselines first, each once; dense_fp8 is added where an fp8 mode needs it to be compared with."""
    modes = [_parse(name) for name in names]
    modes = list({mode.name: mode for mode in modes}.values())
    fp8 = any(mode.fp8 for mode in modes)
    baselines = [Mode("dense_bf16", None), *([Mode("dense_fp8", None, "prefill")] if fp8 else [])]
    return baselines + [mode for mode in modes if mode.recipe is not None]


def _parse(name: str) -> Mode:
    if name in ("dense", "dense-fp8"):
        return Mode("dense_fp8", None, "prefill") if name == "dense-fp8" else Mode("dense_bf16", None)
    found = re.fullmatch(r"nm-([^/-]+)(?:/([^/-]+))?(?:-fp8(?:-(prefill|decode))?)?(?:-head-(e4m3|int8))?", name)
    if found:
        fp8 = (found[3] or "both") if "-fp8" in name else None
        return Mode(name, nm_act.Recipe(found[1], decode_pattern=found[2]), fp8, found[4])
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        return Mode(Path(name).stem, nm_act.Recipe.load(name))
    raise ValueError(
        "expected a mode such as dense, nm-2:4, nm-2:4/8:16, nm-8:16-fp8, nm-8:16-fp8-head-int8 "
        f"(or -head-e4m3: the output head in 8 bits too), nm-2:4-fp8-prefill or a recipe file, got {name!r}; write one "
        "of those"
    )


def build(name: str, mode: Mode, device: str, dtype: torch.dtype, max_tokens: int) -> nn.Module:
    """The model of one mode on the device, optimized: random weights for a name in CONFIGS, else a checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if name in CONFIGS:
        config = AutoConfig.for_model(**CONFIGS[name], max_position_embeddings=max_tokens)
        with torch.device(device):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    model.eval().requires_grad_(False)
    if mode.recipe is not None:
        nm_act.sparsify(model, mode.recipe)
        nm_act.optimize(model, fp8=mode.fp8, head=mode.head)
        return model
    nm_act.optimize(model)
    if mode.fp8:
        _to_dense_fp8(model)
    return model


class DenseFP8(nn.Module):
    """The strongest dense fp8 layer: fused per-token quantisation, then torch's row-wise scaled product."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows = [quantise_rows(part) for part in linear.weight.split(4096)]
        self.register_buffer("weight", torch.cat([codes for codes, _ in rows]))
        self.register_buffer("weight_scale", torch.cat([scale for _, scale in rows]))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from dense_fp8 import product, quantise

        y = product(*quantise(x.reshape(-1, self.in_features)), self.weight, self.weight_scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def _to_dense_fp8(model: nn.Module) -> None:
    for layer in model.get_decoder().layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, DenseFP8(child))


def compile_parts(model: nn.Module) -> Callable[[], None]:
    """Compile what surrounds the products, in the dense and the sparse model alike; returns how to undo it.

    The rotary embedding, the norms and the gated activation each become one kernel, for every shape; the products are
    library calls that a compiler would leave as they are. Compiling whole models takes minutes a shape instead.
    """
    # Batch or tokens of one, and norms of heads, are shapes of their own.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    family = importlib.import_module(type(model).__module__)
    norm = type(model.get_decoder().norm)
    before = (family.apply_rotary_pos_emb, norm.forward, fused.gated)

    def gated(act_fn, gate, up):
        function = _GATED.get(type(act_fn).__name__)
        # For each shape anew: a kernel for any shape reads the halves of a merged product at half the speed.
        return before[2](act_fn, gate, up) if function is None else _compiled(function, dynamic=False)(gate, up)

    family.apply_rotary_pos_emb, norm.forward, fused.gated = _compiled(before[0]), _compiled(before[1]), gated

    def undo() -> None:
        family.apply_rotary_pos_emb, norm.forward, fused.gated = before

    return undo


@functools.cache
def _compiled(function: Callable, dynamic: bool = True) -> Callable:
    return torch.compile(function, dynamic=dynamic)


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _gelu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


_GATED = {"SiLUActivation": _silu_mul, "GELUTanh": _gelu_mul}
