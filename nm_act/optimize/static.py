"""Decoding with a cache of fixed size, with CUDA graphs on a GPU."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.kv_cache import cache_argument
from ..layers.linear import sparse_layers
from . import static_attention
from .eligible import check_module

WARMUP = 3
"""Number of steps before a capture, in which libraries load their kernels and choose algorithms."""


class StaticDecoder:
    """Greedy decoding of a batch of equally long prompts, with all memory allocated once.

    On CUDA a decode step is one graph launch, and so is a prefill of a length given to :meth:`capture_prefill`;
    other lengths run directly and compile nothing. On a CPU everything runs directly.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only model, dense, sparse or optimized, on one device. Its attention must use Transformers' attention
        interface, as in all models that allow ``attn_implementation="sdpa"``.
    batch : int
        Number of sequences.
    max_tokens : int
        Largest number of tokens per sequence, prompt included.

    Raises
    ------
    ValueError
        If the model is spread over devices, a size is out of range, the forward of a module that reads the model's
        config was replaced (by accelerate's hooks or torch.compile), or the model is on CUDA and its recipe keeps first
        tokens dense: every call then reads positions back from the device, which a graph cannot do.

    Notes
    -----
    Prompts attend to the filled part of the cache; so do steps on CUDA in 16 bits, where torch's flash attention reads
    the length on the device. Other steps mask the whole cache; on a GPU, a logged line says why. Only one thread at a
    time may use a decoder; the model itself is not changed, and other threads may run it meanwhile. Padding is not
    supported; use ``model.generate`` for it. With ``cache_implementation="static"``, ``generate`` replays graphs too,
    but spends 1.6 ms of host time on each step (H100, torch 2.11), a third of a step of Llama-3-8B.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    ...                      vocab_size=99)
    >>> decoder = StaticDecoder(LlamaForCausalLM(config).eval(), max_tokens=16)
    >>> decoder.generate(torch.tensor([[1, 2, 3]]), 5).shape
    torch.Size([1, 8])
    """

    def __init__(self, model: nn.Module, *, batch: int = 1, max_tokens: int):
        check_module(model)
        if not hasattr(model, "config"):
            raise TypeError(
                f"expected a Transformers model, got {type(model).__name__} without a config; pass a whole model"
            )
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            raise ValueError(
                f"expected a model on one device, got {', '.join(sorted(map(str, devices)))}; load it without "
                "device_map"
            )
        whole = all(isinstance(count, int) for count in (batch, max_tokens))
        if not whole or batch < 1 or max_tokens <= WARMUP:
            raise ValueError(
                f"expected integers batch >= 1 and max_tokens > {WARMUP}, got {batch} and {max_tokens}; give the "
                "number of sequences, and of tokens of the longest prompt with its continuation"
            )
        if next(iter(devices)).type == "cuda":
            _refuse_first_tokens(model)
        static_attention.register()
        self.model, self.batch, self.max_tokens = model, batch, max_tokens
        self.device = next(iter(devices))
        transformer: Any = model
        self._config = transformer.config.get_text_config()
        self._static_config = copy.deepcopy(self._config)
        view = _with_config(model, self._config, self._static_config)
        if view is None:
            raise ValueError(
                f"expected a model whose attention reads its config, got {type(model).__name__}, where no module holds "
                "it; use model.generate"
            )
        view.get_decoder().set_attn_implementation(static_attention.ATTENTION)
        if self._static_config._attn_implementation != static_attention.ATTENTION:
            raise ValueError(
                f"expected a model that follows Transformers' attention interface, got {type(model).__name__} with its "
                f"attention still {self._static_config._attn_implementation!r}; use model.generate"
            )
        self.length = 0
        new = functools.partial(torch.zeros, dtype=torch.long, device=self.device)
        self.token = new(batch, 1)
        self.logits: Tensor | None = None
        self._position = new(1, 1)
        self._lengths = new(batch, dtype=torch.int32)
        self._cache = _full_cache(self._config, max_tokens)
        self._cache_name = cache_argument(model)
        self._pool: Any = None
        self._step_graph: Callable[[], None] | None = None
        self._prefill_graphs: dict[int, tuple[Tensor, Callable[[], None]]] = {}
        self._flash = static_attention.try_flash(self._config, transformer.dtype, self.device)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Read the prompts ``[batch, tokens]``, int64; returns the first new token of each, ``[batch, 1]``.

        Raises
        ------
        ValueError
            If the shape does not fit the batch or the cache.
        """
        self._check_prompt(input_ids)
        tokens = input_ids.shape[1]
        if tokens in self._prefill_graphs:
            static_ids, replay = self._prefill_graphs[tokens]
            static_ids.copy_(input_ids)
            replay()
        else:
            self._prefill(input_ids.to(self.device))
        self.length = tokens
        return self.token

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Append the last token and compute the next, ``[batch, 1]``: the buffer ``token``, which each step overwrites.

        Raises
        ------
        ValueError
            If nothing was prefilled, or the cache is full.
        """
        if not 0 < self.length < self.max_tokens:
            raise ValueError(
                f"expected 1 to {self.max_tokens - 1} tokens in the cache of {self.max_tokens}, got {self.length}; "
                "call prefill first, or make a decoder with a larger max_tokens"
            )
        if self.device.type == "cuda":
            if self._step_graph is None:
                self.capture_step()
            assert self._step_graph is not None
            self._step_graph()
        else:
            self._step()
        self.length += 1
        return self.token

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy continuation ``[batch, tokens + max_new_tokens]``; it never stops early."""
        self._check_prompt(input_ids, max_new_tokens)
        tokens = [input_ids.to(self.device), self.prefill(input_ids).clone()]
        tokens += [self.step().clone() for _ in range(max_new_tokens - 1)]
        return torch.cat(tokens, dim=1)

    @torch.inference_mode()
    def capture_step(self) -> None:
        """Capture the decode step, as the first :meth:`step` does automatically. The running sequence is kept.

        Raises
        ------
        ValueError
            If the model is not on CUDA.
        """
        self._check_graphs()
        # From the beginning of the cache, because steps beyond its end would write out of bounds.
        with self._kept(WARMUP):
            self._rewind(0)
            self._step_graph = self._captured(self._step, lambda: self._rewind(0))

    @torch.inference_mode()
    def capture_prefill(self, tokens: int) -> None:
        """Capture the prefill of prompts of one length; worthwhile for short prompts, whose time launches dominate.

        The running sequence is kept.

        Raises
        ------
        ValueError
            If the model is not on CUDA, or the length does not fit the cache.
        """
        self._check_graphs()
        self._check_prompt(torch.empty(self.batch, tokens, dtype=torch.long, device="meta"))
        ids = torch.zeros(self.batch, tokens, dtype=torch.long, device=self.device)
        with self._kept(tokens):
            self._prefill_graphs[tokens] = (ids, self._captured(lambda: self._prefill(ids), lambda: None))

    def _prefill(self, input_ids: Tensor) -> None:
        tokens = input_ids.shape[1]
        self._rewind(0)
        self._lengths.fill_(tokens)
        self._forward(input_ids, torch.arange(tokens, device=self.device)[None])
        self._position.fill_(tokens)

    def _step(self) -> None:
        self._lengths.add_(1)
        self._forward(self.token, self._position)
        self._position.add_(1)

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> None:
        # A view of this call: other callers may use the model, its layers and weights meanwhile.
        model = _with_config(self.model, self._config, self._static_config)
        output = model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=True,
            **{self._cache_name: self._cache},
            logits_to_keep=1,
            attention_mask=self._lengths.view(-1, 1, 1, 1),
            nm_act_lengths=self._lengths,  # for an attention that updates the cache itself
        )
        self.logits = output.logits
        self.token.copy_(_most_likely(output.logits[:, -1:]))

    def _captured(self, function: Callable[[], None], before: Callable[[], None]) -> Callable[[], None]:
        """One graph launch for what ``function`` enqueues."""
        side = _side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                function()
        torch.cuda.current_stream(self.device).wait_stream(side)
        before()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # One pool for all graphs, because none needs its intermediate results after another has run.
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        self._pool = self._pool or graph.pool()
        logits = self.logits

        def replay() -> None:
            graph.replay()
            self.logits = logits

        return replay

    @contextmanager
    def _kept(self, tokens: int) -> Iterator[None]:
        """Restore the running sequence afterwards: the block overwrites the first tokens of the cache."""
        logits, saved = self.logits, [tensor.clone() for tensor in self._state()]
        cached = [(layer.keys[:, :, :tokens].clone(), layer.values[:, :, :tokens].clone()) for layer in self._layers()]
        try:
            yield
        finally:
            self.logits = logits
            # Layers that the block initialises need no restoring: the first prefill rewinds them.
            for tensor, value in zip(self._state(), saved, strict=False):
                tensor.copy_(value)
            for layer, (keys, values) in zip(self._layers(), cached, strict=False):
                layer.keys[:, :, :tokens].copy_(keys)
                layer.values[:, :, :tokens].copy_(values)

    def _state(self) -> Iterator[Tensor]:
        yield from (self.token, self._position, self._lengths)
        yield from (layer.cumulative_length for layer in self._layers())

    def _layers(self) -> list[Any]:
        return [layer for layer in self._cache.layers if layer.is_initialized]

    def _rewind(self, length: int) -> None:
        self._position.fill_(length)
        self._lengths.fill_(length)
        for layer in self._layers():
            layer.cumulative_length.fill_(length)

    def _check_graphs(self) -> None:
        if self.device.type != "cuda":
            raise ValueError(
                f"expected a model on CUDA to capture, got one on {self.device.type}; call prefill and step, which run "
                "directly there"
            )

    def _check_prompt(self, input_ids: Tensor, new_tokens: int = 1) -> None:
        if input_ids.is_floating_point() or input_ids.is_complex():
            raise TypeError(
                f"expected a prompt of token ids, got {input_ids.dtype}; give integers such as a tokenizer's"
            )
        if input_ids.ndim != 2 or input_ids.shape[0] != self.batch or input_ids.shape[1] == 0:
            raise ValueError(
                f"expected a prompt of shape [{self.batch}, tokens], got {list(input_ids.shape)}; make a decoder with "
                "that batch"
            )
        if new_tokens < 1:
            raise ValueError(f"expected at least one new token, got {new_tokens}; give a larger max_new_tokens")
        # The last token is never appended to the cache.
        if input_ids.shape[1] + new_tokens - 1 > self.max_tokens:
            raise ValueError(
                f"expected prompt and new tokens within the cache of {self.max_tokens}, got {input_ids.shape[1]} + "
                f"{new_tokens}; make a decoder with a larger max_tokens"
            )


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for warming up graphs: one per device, because cuBLAS keeps a workspace for each stream it sees."""
    return torch.cuda.Stream(device)


def _refuse_first_tokens(model: nn.Module) -> None:
    contexts = (layer.token_context for layer in sparse_layers(model).values())
    first = next((context.first_tokens for context in contexts if context is not None and context.first_tokens), 0)
    if first:
        raise ValueError(
            f"expected a recipe without dense_first_tokens, which no CUDA graph can follow, got {first}; leave it out "
            "or use model.generate"
        )


def _with_config(module: nn.Module, before: Any, after: Any, name: str = "the model") -> Any:
    """A shallow copy of ``module`` that reads the config ``after`` instead of ``before``; None if nothing reads it.

    The modules that hold the config and their parents are copied; all others, and all parameters, are shared.
    """
    changed = {}
    for child, each in module._modules.items():
        copied = None if each is None else _with_config(each, before, after, child)
        if copied is not None:
            changed[child] = copied
    holds = vars(module).get("config") is before
    if not (changed or holds):
        return None
    if "forward" in vars(module):  # bound to the original module, which has different attention
        raise ValueError(
            f"expected modules with the forward of their class, got another one on {name} ({type(module).__name__}); "
            "make the decoder of a model without hooks of accelerate and without a compiled forward"
        )
    copied = module.__new__(type(module))
    copied.__dict__ = vars(module) | {"_modules": module._modules | changed} | ({"config": after} if holds else {})
    return copied


def _full_cache(config: Any, max_tokens: int) -> Any:
    """A cache that holds all tokens of every layer; attention applies the windows."""
    from transformers.cache_utils import Cache, StaticLayer

    return Cache(layers=[StaticLayer(max_cache_len=max_tokens) for _ in range(config.num_hidden_layers)])


def _most_likely(logits: Tensor) -> Tensor:
    """``logits.argmax(-1)``; of equal logits, the first.

    torch reduces a row in one block, which takes 41 us for 128 256 words on an H100. So the words are divided into rows
    first.
    """
    if not logits.is_cuda:
        return logits.argmax(dim=-1)
    words = logits.shape[-1]
    rows = next((n for n in range(math.isqrt(words), 15, -1) if words % n == 0), 1)
    if rows == 1:
        return logits.argmax(dim=-1)
    best = logits.unflatten(-1, (rows, -1)).max(dim=-1)
    row = best.values.argmax(dim=-1, keepdim=True)
    return torch.add(best.indices.gather(-1, row), row, alpha=words // rows).squeeze(-1)
