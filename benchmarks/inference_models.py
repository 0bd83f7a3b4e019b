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
from nm_act.ops.e4m3 import E4M3, FEW_TOKENS, E4M3Weight
from nm_act.ops.fused import Pruned, pruned_product
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
    """How a model runs: those of ``BASELINES`` are dense, everything else is sparse.

    ``fp8`` is None, or the phases that the e4m3 weights are stored for.
    ``head`` is what the output head is stored as, or None.
    """

    name: str
    recipe: nm_act.Recipe | None
    fp8: str | None = None
    head: str | None = None


BASELINES = {
    "dense": Mode("dense_bf16", None),
    "dense-fp8": Mode("dense_fp8", None, "prefill"),
    "dense-fp8-gather": Mode("dense_fp8_gather", None, "both"),
}
"""Dense modes by name. dense-fp8-gather decodes with this package's own kernel over a second copy of the e4m3 weights,
stored [in, out], without a selection: what a sparse decode step gains beyond that, it gains by skipping rows."""


def parse_modes(names: list[str], add_baselines: bool = True) -> list[Mode]:
    """Modes by name, each once; first the baselines, and where an fp8 mode is compared with them those in fp8."""
    modes = [_parse(name) for name in names]
    modes = list({mode.name: mode for mode in modes}.values())
    if not add_baselines:
        return modes
    fp8 = any(mode.fp8 for mode in modes)
    baselines = [mode for mode in BASELINES.values() if fp8 or not mode.fp8]
    return baselines + [mode for mode in modes if mode.recipe is not None]


def _parse(name: str) -> Mode:
    if name in BASELINES:
        return BASELINES[name]
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
        _to_dense_fp8(model, mode.fp8)
    return model


class DenseFP8(nn.Module):
    """A dense e4m3 layer: fused per-token quantisation, then the product of this package's own dense e4m3 path.

    For ``layout`` "both", few tokens stay in 16 bits and read a copy stored [in, out] in the gather kernel, every row.
    """

    def __init__(self, linear: nn.Linear, layout: str):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        stored = E4M3Weight.quantised(linear.weight, layout)
        self.register_buffer("codes", stored.codes)
        self.register_buffer("rows", stored.rows)
        self.register_buffer("weight_scale", stored.scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None and x.shape[:-1].numel() <= FEW_TOKENS:
            return nm_act.gather_linear(x, self.rows.view(E4M3).t(), self.bias, weight_scale=self.weight_scale)
        from dense_fp8 import quantise

        values, scales = quantise(x.reshape(-1, self.in_features))
        y = pruned_product(Pruned(values, scales[:, 0]), self.codes.view(E4M3), self.bias, self.weight_scale)
        return y.view(*x.shape[:-1], self.out_features)


def _to_dense_fp8(model: nn.Module, layout: str) -> None:
    for layer in model.get_decoder().layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, DenseFP8(child, layout))


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
