"""End-to-end training as nm_act.lab.calibrate.distill does it, with both passes of a step as one CUDA graph.

A step of a small model is thousands of short kernels, which a host launches far more slowly than a GPU runs them (H100:
0.9 s a step through Transformers). Here a Llama is plain torch without a read from the device, so that a graph holds a
whole step: bfloat16 products, float32 masters, straight through the selection. The loss, the held-out check and what is
kept are those of `distill`. On a CPU the same code runs without a graph.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_act.lab.calibrate.distill import Distilled
from nm_act.lab.calibrate.training import BETAS, LARGEST_GRADIENT, linear_schedule
from nm_act.lab.evaluate.perplexity import mean_and_stderr
from nm_act.layers.linear import NMLinear
from nm_act.ops import operators
from nm_act.ops.formulas import ratio_root

LEARNED = ("shift", "column_scale", "added_bias", "low_rank_in", "low_rank_out")
CHECKS = 4


class Select(torch.autograd.Function):
    """``P(z)``; the gradient passes straight through to the survivors."""

    @staticmethod
    def forward(ctx, z, scale, pattern):
        pruned = operators.prune(z, pattern, channel_scale=scale)
        ctx.save_for_backward(pruned)
        return pruned

    @staticmethod
    def backward(ctx, gradient):
        [pruned] = ctx.saved_tensors
        return torch.where(pruned != 0, gradient, 0), None, None


@dataclass
class Linear:
    """A sparse layer's weight and data, float32 masters."""

    layer: NMLinear
    weight: Tensor
    data: dict[str, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        spec, data = self.layer.spec, self.data
        weight, low_rank = self.weight, None
        if "low_rank_in" in data:
            low_rank = data["low_rank_in"], data["low_rank_out"]
            weight = weight - low_rank[1] @ low_rank[0]
        scale = None
        if spec.criterion == "wina":  # with a fitted pair, of the whole weight
            fitted = any(name.endswith("-fit") for name in spec.mitigation)
            scale = torch.linalg.vector_norm((self.weight if fitted else weight).detach(), dim=0)
        z = x if "shift" not in data else (x.float() - data["shift"]).to(x.dtype)
        pruned = Select.apply(z, scale, spec.pattern)
        y = F.linear(pruned, weight.to(x.dtype))
        if "var" in spec.mitigation:
            total, kept = (each.float().var(dim=-1, keepdim=True, correction=0) for each in (z, pruned))
            y = y.float() * ratio_root(total, kept)
        if "shift" in data:
            y = y.float() + weight @ data["shift"]
        if "column_scale" in data:
            y = y.float() * data["column_scale"] + data["added_bias"]
        y = y.to(x.dtype)
        if low_rank is not None:
            y = y + F.linear(F.linear(x, low_rank[0].to(x.dtype)), low_rank[1].to(x.dtype))
        return y


class Llama:
    """A Transformers Llama without a read from the device: its dense parts, and a function for every projection."""

    def __init__(
        self, model: nn.Module, length: int, dtype: torch.dtype, linears: dict[str, Callable[[Tensor], Tensor]]
    ):
        config, stack = model.config, model.model
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps, self.linears = config.rms_norm_eps, linears
        self.embedding, self.head = stack.embed_tokens.weight.to(dtype), model.lm_head.weight.to(dtype)
        self.norms = [
            [norm.weight.to(dtype) for norm in (b.input_layernorm, b.post_attention_layernorm)] for b in stack.layers
        ]
        self.last = stack.norm.weight.to(dtype)
        places = torch.arange(length, device=self.embedding.device)[None]
        self.cos, self.sin = (each[:, None].to(dtype) for each in stack.rotary_emb(self.embedding[:1, None], places))
        for index, block in enumerate(stack.layers):
            for part in (block.self_attn, block.mlp):
                for name, module in part.named_children():
                    if isinstance(module, nn.Linear) and f"{index}.{name}" not in linears:
                        weight = module.weight.detach().to(dtype)
                        linears[f"{index}.{name}"] = lambda x, weight=weight: F.linear(x, weight)

    def logits(self, ids: Tensor) -> Tensor:
        """``[windows, length, vocabulary]``."""
        x = F.embedding(ids, self.embedding)
        for index in range(len(self.norms)):
            x = self.block(index, x)
        return F.linear(self._norm(x, self.last), self.head)

    def block(self, index: int, x: Tensor) -> Tensor:
        """One decoder block, ``[windows, length, hidden]``."""
        before, behind = self.norms[index]
        x = x + self._attention(index, self._norm(x, before))
        h = self._norm(x, behind)
        h = F.silu(self.linears[f"{index}.gate_proj"](h)) * self.linears[f"{index}.up_proj"](h)
        return x + self.linears[f"{index}.down_proj"](h)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)

    def _attention(self, index: int, h: Tensor) -> Tensor:
        q, k, v = (
            self.linears[f"{index}.{name}_proj"](h).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name, heads in (("q", self.heads), ("k", self.key_heads), ("v", self.key_heads))
        )
        q, k = (each * self.cos + self._turned(each) * self.sin for each in (q, k))
        k, v = (each.repeat_interleave(self.heads // self.key_heads, dim=1) for each in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.linears[f"{index}.o_proj"](y.transpose(1, 2).flatten(2))

    @staticmethod
    def _turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)


def train_graphed(
    model: nn.Module,
    dense: nn.Module,
    windows: Tensor,
    held_out: Tensor,
    *,
    steps: int,
    batch: int,
    what: str,
    rate: float,
    progress: Callable[[int, int, float], None],
    dtype: torch.dtype = torch.bfloat16,
) -> Distilled:
    """`distill` of a sparse Llama; ``what`` is "weights" or "data"."""
    device = next(model.parameters()).device
    windows, held_out = windows.to(device), held_out.to(device)
    layers, linears = linears_of(model)
    teacher = Llama(dense, windows.shape[1], dtype, {})
    student = Llama(dense, windows.shape[1], dtype, dict(linears))
    if what == "weights":
        parameters = [each.weight for each in linears.values()]
    else:
        parameters = [value for each in linears.values() for value in each.data.values()]
    start = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=0.0, fused=device.type == "cuda")
    ids = windows[:batch].clone()
    forward_backward = _step(lambda: _divergence(student, teacher, ids).mean(), parameters, device)
    before = _losses(student, teacher, held_out)
    best = math.fsum(before), start, before
    history = []
    generator = torch.Generator().manual_seed(0)
    count = math.ceil(steps * batch / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(count)])
    for step in range(1, steps + 1):
        ids.copy_(windows[order[(step - 1) * batch : step * batch].to(device)])
        loss = forward_backward()
        optimizer.param_groups[0]["lr"] = rate * linear_schedule(step - 1, steps)
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        if step in (1, 2, 16) or step % 64 == 0:
            progress(step, steps, loss.item())
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            found = _losses(student, teacher, held_out)
            history.append({"step": step, "loss": loss.item(), "held_out": math.fsum(found) / len(found)})
            if math.fsum(found) < best[0]:
                best = math.fsum(found), [parameter.detach().clone() for parameter in parameters], found
    difference, stderr = mean_and_stderr([new - old for new, old in zip(best[2], before, strict=True)])
    kept = difference < -2 * stderr
    with torch.no_grad():
        for parameter, value in zip(parameters, best[1] if kept else start, strict=True):
            parameter.copy_(value)
        for name, layer in layers.items():
            if what == "weights":
                layer.weight.copy_(linears[name].weight)
                layer.refresh()
            else:
                layer.set_data(**{key: value.detach() for key, value in linears[name].data.items()})
    total = len(before)
    return Distilled(kept, math.fsum(before) / total, best[0] / total, difference, stderr, history)


def linears_of(model: nn.Module) -> tuple[dict[str, NMLinear], dict[str, Linear]]:
    """The sparse layers of a model and copies of what they compute with, by block and projection."""
    layers = {_short(name): module for name, module in model.named_modules() if isinstance(module, NMLinear)}
    unknown = next((layer.spec for layer in layers.values() if layer.spec.criterion not in ("act", "wina")), None)
    if unknown is not None:
        raise ValueError(f"expected the criterion act or wina, got {unknown}; train it with nm-act calibrate")
    linears = {
        name: Linear(
            layer,
            layer.weight.detach().float().contiguous().clone(),
            {key: value.detach().clone() for key, value in layer.data().items() if key in LEARNED},
        )
        for name, layer in layers.items()
    }
    return layers, linears


def _short(name: str) -> str:
    parts = name.split(".")
    return f"{parts[-3]}.{parts[-1]}"


def _divergence(student: Llama, teacher: Llama, ids: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = teacher.logits(ids).float().log_softmax(dim=-1)
    found = student.logits(ids).float().log_softmax(dim=-1)
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(dim=-1).mean(dim=-1)


@torch.no_grad()
def _losses(student: Llama, teacher: Llama, windows: Tensor) -> list[float]:
    return [value for some in windows.split(8) for value in _divergence(student, teacher, some).tolist()]


def _step(loss_of: Callable[[], Tensor], parameters: list[Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function that leaves new gradients in the parameters and returns the loss."""

    def eager() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = loss_of()
        loss.backward()
        return loss.detach()

    if device.type != "cuda":
        return eager
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                eager()
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = loss_of()
            loss.backward()
    except RuntimeError as error:
        print(f"no CUDA graph ({' '.join(str(error).split())[:200]}): steps are launched one by one", flush=True)
        torch.cuda.synchronize()
        return eager

    def replay() -> Tensor:
        graph.replay()
        return loss.detach()

    return replay
