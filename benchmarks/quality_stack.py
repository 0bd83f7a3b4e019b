"""A Llama as a few tensors: products merged as `nm_act.optimize` merges them, selection by magnitude in front of each.

A step of training has a third of the kernels that the model has with its layers one by one. `folded` scales norms, up
and v against the weights behind them, so that selection by magnitude is WINA's with one score for the merged layers:
the dense function is the same, and the sparse model has no score of its own that would keep `optimize` from merging.
"""

import copy
import itertools

import torch
from quality_training import Select
from torch import Tensor, nn
from torch.nn import functional as F

from nm_act.lab.evaluate.variants import sparse_copy
from nm_act.lab.measured import MERGED
from nm_act.layers.linear import NMLinear
from nm_act.patterns import NMPattern
from nm_act.recipe import Recipe

TENSORS = 6
"""Of a layer: its first norm, q/k/v, o, its second norm, gate/up, down."""

PRODUCTS = (1, 2, 4, 5)
"""The places of the products of `MERGED` among them."""

Patterns = list[list[NMPattern | None]]
"""Pattern of each product of each layer; None is dense."""


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Float32 copies of a stock Llama's norms and merged weights, `TENSORS` a layer."""
    found = []
    for block in model.model.layers:
        children = dict(itertools.chain(block.self_attn.named_children(), block.mlp.named_children()))
        qkv, o, gate_up, down = (torch.cat([children[name].weight for name in names]) for names in MERGED)
        norms = block.input_layernorm.weight, block.post_attention_layernorm.weight
        found += [norms[0], qkv, o, norms[1], gate_up, down]
    return [each.detach().float().clone() for each in found]


def folded(tensors: list[Tensor], heads: int, key_heads: int) -> list[Tensor]:
    """The same function with columns of equal norm in every merged weight (in o, of equal norm over a key head's)."""
    found = []
    for start in range(0, len(tensors), TENSORS):
        first, qkv, o, second, gate_up, down = (each.clone() for each in tensors[start : start + TENSORS])
        scale = _evened(torch.linalg.vector_norm(down, dim=0))
        gate_up[down.shape[1] :] *= scale[:, None]
        down /= scale
        by_head = torch.linalg.vector_norm(o, dim=0).view(key_heads, heads // key_heads, -1)
        scale = _evened(by_head.square().mean(dim=1).sqrt())
        qkv[-scale.numel() :] *= scale.flatten()[:, None]
        o /= scale[:, None].expand_as(by_head).flatten()
        for norm, weight in ((first, qkv), (second, gate_up)):
            scale = _evened(torch.linalg.vector_norm(weight, dim=0))
            norm *= scale
            weight /= scale
        found += [first, qkv, o, second, gate_up, down]
    return found


def _evened(norms: Tensor) -> Tensor:
    return (norms / norms.mean()).clamp_min(1e-3)


def sparse_model(dense: nn.Module, recipe: Recipe, tensors: list[Tensor]) -> nn.Module:
    """A sparse copy of a model with these tensors in place of its own."""
    model = sparse_copy(dense, recipe).model
    for index, block in enumerate(model.model.layers):
        first, qkv, o, second, gate_up, down = tensors[TENSORS * index : TENSORS * (index + 1)]
        children = dict(itertools.chain(block.self_attn.named_children(), block.mlp.named_children()))
        for names, weight in zip(MERGED, (qkv, o, gate_up, down), strict=True):
            sizes = [children[name].out_features for name in names]
            for name, part in zip(names, weight.split(sizes), strict=True):
                _set_weight(children[name], part)
        for name, norm in (("input_layernorm", first), ("post_attention_layernorm", second)):
            module = copy.copy(getattr(block, name))  # the dense model's own stays as it is
            module._parameters = dict(module._parameters)
            _set_weight(module, norm)
            setattr(block, name, module)
    return model


def _set_weight(module: nn.Module, value: Tensor) -> None:
    value = value.detach().to(module.weight.dtype)
    if isinstance(module, NMLinear):
        with torch.no_grad():
            module.weight.copy_(value)
        module.refresh()
    else:
        module.weight = nn.Parameter(value.clone(), requires_grad=False)


def patterns_of(recipe: Recipe, layers: int) -> Patterns:
    """What a recipe prunes in every product; ValueError if merged layers differ or select other than by magnitude."""
    found: Patterns = []
    for layer in range(layers):
        found.append([])
        for names in MERGED:
            specs = {recipe.resolve(layer, name) for name in names}
            spec = specs.pop()
            if specs or (spec is not None and (spec.criterion != "act" or spec.mitigation)):
                raise ValueError(f"expected one spec with act alone in layer {layer}, {'/'.join(names)}, got {recipe}")
            found[-1].append(None if spec is None else spec.pattern)
    return found


class Stack:
    """Hidden states of a Llama with given tensors; embedding, head and last norm are the dense model's."""

    def __init__(self, model: nn.Module, length: int, dtype: torch.dtype, tensors: list[Tensor]):
        config, base = model.config, model.model
        self.heads, self.key_heads, self.eps = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rms_norm_eps,
        )
        self.embedding, self.head = (each.weight.detach().to(dtype) for each in (base.embed_tokens, model.lm_head))
        self.last = base.norm.weight.detach().to(dtype)
        self.tensors = [each.detach().to(dtype).clone() for each in tensors]
        self.layers = len(tensors) // TENSORS
        places = torch.arange(length, device=self.embedding.device)[None]
        cos, sin = (each[0].detach().to(dtype) for each in base.rotary_emb(self.embedding[:1, None], places))
        half = sin.shape[-1] // 2
        self.cos, self.sin = cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)  # of the swapped halves

    @classmethod
    def of(cls, model: nn.Module, length: int, dtype: torch.dtype) -> "Stack":
        """The stock model itself."""
        return cls(model, length, dtype, tensors_of(model))

    def hidden(self, ids: Tensor, patterns: Patterns | None = None) -> Tensor:
        """Last hidden states, normed, of ids ``[windows, length]``."""
        x = F.embedding(ids, self.embedding)
        for index in range(self.layers):
            x = self.layer(index, x, patterns[index] if patterns else (None,) * len(MERGED))
        return self.normed(x)

    def normed(self, x: Tensor) -> Tensor:
        """The last norm."""
        return F.rms_norm(x, self.last.shape, self.last, self.eps)

    def layer(self, index: int, x: Tensor, patterns) -> Tensor:
        """One decoder layer."""
        first, second = (self.tensors[TENSORS * index + place] for place in (0, 3))
        h = F.rms_norm(x, first.shape, first, self.eps)
        h = self._attended(self.product(index, 1, h, patterns[0]))
        x = x + self.product(index, 2, h, patterns[1])
        h = F.rms_norm(x, second.shape, second, self.eps)
        gate, up = self.product(index, 4, h, patterns[2]).chunk(2, dim=-1)
        return x + self.product(index, 5, F.silu(gate) * up, patterns[3])

    def product(self, index: int, place: int, x: Tensor, pattern: NMPattern | None) -> Tensor:
        """One of the `PRODUCTS` of a layer."""
        return F.linear(self._pruned(x, pattern), self.weight(index, place))

    def weight(self, index: int, place: int) -> Tensor:
        """The weight of a product."""
        return self.tensors[TENSORS * index + place]

    def split(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of ``[windows, length, heads, size]``."""
        qkv = qkv.unflatten(-1, (self.heads + 2 * self.key_heads, -1))
        turned, v = qkv.split((self.heads + self.key_heads, self.key_heads), dim=-2)
        swapped = torch.cat(turned.chunk(2, dim=-1)[::-1], dim=-1)
        turned = torch.addcmul(turned * cos[:, None], swapped, sin[:, None])
        return *turned.split((self.heads, self.key_heads), dim=-2), v

    def _attended(self, qkv: Tensor) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in self.split(qkv, self.cos[: qkv.shape[1]], self.sin[: qkv.shape[1]]))
        k, v = (each.repeat_interleave(self.heads // self.key_heads, dim=1) for each in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    @staticmethod
    def _pruned(x: Tensor, pattern: NMPattern | None) -> Tensor:
        return x if pattern is None else Select.apply(x, None, pattern)


class Divergence(torch.autograd.Function):
    """Mean over tokens of KL(wanted || found) between next-token distributions, from hidden states.

    Their gradient is computed in the forward pass, some tokens at a time, so that no logits are kept.
    """

    @staticmethod
    def forward(ctx, hidden, wanted, head):
        losses, gradients = [], []
        for found, want in _log_probabilities(hidden, wanted, head):
            probability = want.exp()
            losses.append((probability * (want - found)).sum(dim=-1))
            gradients.append((found.exp_() - probability).to(head.dtype) @ head)
        ctx.save_for_backward(torch.cat(gradients).div_(len(hidden)))
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx, gradient):
        [found] = ctx.saved_tensors
        return found * gradient.to(found.dtype), None, None


@torch.no_grad()
def token_divergences(hidden: Tensor, wanted: Tensor, head: Tensor) -> Tensor:
    """KL of every token."""
    pairs = _log_probabilities(hidden, wanted, head)
    return torch.cat([(want.exp() * (want - found)).sum(dim=-1) for found, want in pairs])


def _log_probabilities(hidden: Tensor, wanted: Tensor, head: Tensor):
    for some, others in zip(hidden.split(4096), wanted.split(4096), strict=True):
        yield tuple(F.linear(x, head).log_softmax(dim=-1, dtype=torch.float32) for x in (some, others))


@torch.no_grad()
def write_text(stack: Stack, forced: Tensor, lengths: Tensor, temperature: float = 1.0) -> Tensor:
    """Continuations ``[sequences, length]`` of the first ``lengths [sequences]`` tokens of `forced`, dense.

    A temperature of 0 is greedy. On a GPU every token is a replay of a CUDA graph, one for each quarter of the length.
    """
    count, length = forced.shape
    size = stack.cos.shape[-1]
    found = forced.clone()
    cache = stack.embedding.new_zeros(stack.layers, 2, count, stack.key_heads, length, size)
    place = torch.zeros(1, dtype=torch.int64, device=forced.device)
    columns = torch.arange(length, device=forced.device)

    def step(end: int) -> None:
        x = F.embedding(found.index_select(1, place), stack.embedding)
        cos, sin = stack.cos.index_select(0, place), stack.sin.index_select(0, place)
        unseen = (columns[:end] > place)[None, None, None]
        for index in range(stack.layers):
            first, qkv, o, second, gate_up, down = stack.tensors[TENSORS * index : TENSORS * (index + 1)]
            parts = stack.split(F.linear(F.rms_norm(x, first.shape, first, stack.eps), qkv), cos, sin)
            q = parts[0].view(count, stack.key_heads, -1, size)
            for own, new in zip(cache[index], parts[1:], strict=True):
                own.index_copy_(2, place, new.transpose(1, 2))
            keys, values = (own[:, :, :end] for own in cache[index])
            scores = (q @ keys.transpose(-1, -2)).float().mul_(size**-0.5).masked_fill_(unseen, -torch.inf)
            y = scores.softmax(dim=-1).to(q.dtype) @ values
            x = x + F.linear(y.reshape(count, 1, -1), o)
            h = F.rms_norm(x, second.shape, second, stack.eps)
            gate, up = F.linear(h, gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        logits = F.linear(stack.normed(x[:, 0]), stack.head).float()
        if temperature:
            logits = logits.div_(temperature) - torch.empty_like(logits).exponential_().log_()
        new = logits.argmax(dim=-1, keepdim=True)
        place.add_(1)
        new = torch.where(place < lengths[:, None], found.index_select(1, place), new)
        found.index_copy_(1, place, new)

    ends = sorted({-(-length * quarter // 4) for quarter in (1, 2, 3, 4)})
    for before, end in itertools.pairwise([0, *ends]):
        run = _captured(lambda end=end: step(end), place, forced.device)
        for _ in range(before, min(end, length - 1)):
            run()
    return found


def _captured(step, place: Tensor, device: torch.device):
    """The step as a CUDA graph, where there is one; what it wrote on the way is written again by the first replays."""
    if device.type != "cuda":
        return step
    at = place.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        place.copy_(at)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"no CUDA graph ({' '.join(str(error).split())[:200]}): tokens are launched one by one", flush=True)
        return step
    return graph.replay
