"""What layers know of the tokens of a call: positions from whatever holds them, sequences and padding for clact."""

import pytest
import torch
import transformers
from tiny_families import assert_close, logits, sparse
from torch import nn

from nm_act.layers.kv_cache import cache_argument, cache_of
from nm_act.layers.linear import NMLinear
from nm_act.layers.tokens import TokenContext
from nm_act.methods import criteria
from nm_act.recipe import LinearSpec

pytestmark = pytest.mark.contract

FIRST = {"dense_first_tokens": 4}
CLACT = {"criterion": "clact"}


class TestCache:
    """Positions of a cached step, from the cache or the mask; the reference is the call of the whole sequence."""

    IDS = torch.arange(3, 15).view(1, 12)

    @torch.no_grad()
    def stepwise(self, model, cuts, make, **options) -> torch.Tensor:
        state, name, parts = make(), cache_argument(model), []
        for begin, end in zip((0, *cuts), (*cuts, 12), strict=True):
            inputs = {key: value(begin, end) for key, value in options.items()}
            parts.append(model(input_ids=self.IDS[:, begin:end], use_cache=True, **{name: state}, **inputs).logits)
        return torch.cat(parts, dim=1)

    @pytest.mark.parametrize("cuts", [(1,), (3, 4), (6, 7, 8)])
    @pytest.mark.parametrize(
        ("kind", "mask"),
        [(f"{kind}Cache", mask) for kind in ("Dynamic", "Static") for mask in ("none", "up to now")]
        + [("StaticCache", "whole cache")],
    )
    def test_steps_equal_the_whole_sequence(self, cuts, kind, mask):
        model = sparse(**FIRST)
        options = {"max_cache_len": 16} if kind == "StaticCache" else {}
        make = lambda: getattr(transformers, kind)(config=model.config, **options)  # noqa: E731
        width = {"up to now": lambda _begin, end: end, "whole cache": lambda _begin, _end: 16}.get(mask)
        masks = {} if width is None else {"attention_mask": lambda *cut: torch.ones(1, width(*cut), dtype=torch.long)}
        expected = logits(model, input_ids=self.IDS)
        actual = self.stepwise(model, cuts, make, **masks)
        assert_close(actual, expected, atol=1e-4, rtol=1e-3)

    def test_a_mask_that_leaves_the_cache_out_is_refused(self):
        model = sparse(**FIRST)
        make = lambda: transformers.DynamicCache(config=model.config)  # noqa: E731
        sentence = "expected an attention_mask over 3 cached and 9 new tokens, got 9 columns"
        with pytest.raises(ValueError, match=sentence):
            self.stepwise(model, (3,), make, attention_mask=lambda a, b: torch.ones(1, b - a, dtype=torch.long))
        assert model.model.layers[0].mlp.down_proj.token_context._running() is None

    def test_generated_steps_are_not_first_tokens(self):
        """The dense rows of each call, worked out by hand: 4 of the first 12 tokens, none of any step."""
        model = sparse(**FIRST)
        rows = []
        layer = model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda *_: rows.append(layer.token_context._running().rows))
        with torch.no_grad():
            output = model(input_ids=self.IDS, use_cache=True)
            for _ in range(3):
                token = output.logits[:, -1:].argmax(dim=-1)
                output = model(input_ids=token, use_cache=True, **{cache_argument(model): cache_of(output)})
        assert rows == [slice(0, 4), None, None, None]


class Stack(nn.Module):
    """A stack whose state is whatever it is given, under any name."""

    def __init__(self, layer: NMLinear, context: TokenContext):
        super().__init__()
        self.layer = layer
        layer.token_context = context
        context.attach(self)

    def forward(self, inputs_embeds, attention_mask=None, position_ids=None, memory=None, **kwargs):
        return self.layer(inputs_embeds)


class Held:
    """A KV cache of some library: nothing but its length is known."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def get_seq_length(self) -> int:
        return self.tokens


class RecurrentCache:
    """A state that says no length, as one without attention layers."""

    def __init__(self, begun: bool):
        self.begun = begun

    def get_seq_length(self) -> int:
        raise ValueError("no attention layer")

    def has_previous_state(self) -> bool:
        return self.begun


@torch.no_grad()
def first_rows(first: int, **inputs) -> list[int]:
    """Which of 5 tokens a stack computes dense: where its output is the dense one's."""
    layer = NMLinear.from_linear(nn.Linear(16, 8), LinearSpec("1:4"))
    x = torch.randn(1, 5, 16)
    y = Stack(layer, TokenContext(first))(x, **inputs)
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    return (y - dense).abs().amax(dim=-1)[0].lt(1e-6).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"memory": Held(2)}, [0]),
        ({"cache": Held(1), "use_cache": True}, [0, 1]),
        ({"past_key_values": Held(7)}, []),
        ({"cache": RecurrentCache(False)}, [0, 1, 2]),
        ({"cache": RecurrentCache(True), "position_ids": torch.arange(1, 6)[None]}, [0, 1]),
        ({"cache": RecurrentCache(True), "attention_mask": torch.ones(1, 7, dtype=torch.long)}, [0]),
        ({"past_key_values": ((torch.zeros(1, 1, 3, 4),) * 2,), "position_ids": torch.arange(3, 8)}, []),
        ({"position_ids": torch.tensor([[7, 8, 0, 1, 2]])}, [2, 3, 4]),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, [1, 2, 3]),
    ],
)
def test_positions_come_from_whatever_holds_them(inputs, expected):
    assert first_rows(3, **inputs) == expected


@pytest.mark.parametrize(
    "inputs",
    [
        {"cache": RecurrentCache(True)},
        {"cache": RecurrentCache(True), "attention_mask": torch.ones(1, 5, dtype=torch.long)},
        {"past_key_values": ((torch.zeros(1, 1, 3, 4),) * 2,)},
        {"layer_past": [[torch.zeros(1, 1, 3, 4)] * 2]},
        {"memory": type("PagedCache", (), {})()},
        {"state": [torch.zeros(1, 16)] * 2},
    ],
)
def test_a_state_that_does_not_say_its_length_is_refused(inputs):
    sentence = "expected position_ids or a KV cache with get_seq_length .* got a state of anot"
    with pytest.raises(ValueError, match=sentence):
        first_rows(3, **inputs)


def test_a_layer_that_runs_again_without_its_call_is_refused():
    """Within one, tests/layers/test_training.py has the gradients."""
    layer = NMLinear.from_linear(nn.Linear(16, 8), LinearSpec("1:4"))
    layer.token_context = TokenContext(1)
    x = torch.randn(1, 5, 16, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: layer(x).detach() * scale.square(), x, use_reentrant=False)
    sentence = "got a layer with dense_first_tokens or clact that is run again in the backward pass"
    with pytest.raises(RuntimeError, match=sentence):
        y.sum().backward()


class TestClact:
    def layer(self) -> NMLinear:
        return NMLinear.from_linear(nn.Linear(16, 8), LinearSpec("2:4", "clact"))

    def test_the_scale_is_that_of_the_tokens_that_count(self):
        x = torch.tensor([[3.0, 0.0], [4.0, 2.0], [float("nan"), float("inf")]])
        valid = torch.tensor([True, True, False])
        assert criteria.call_scale(x, valid).tolist() == [5.0, 2.0]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @torch.no_grad()
    def test_padding_may_hold_anything(self, value):
        layer = self.layer()
        stack = Stack(layer, TokenContext(0))
        x, mask = torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.long)
        mask[0, :2], mask[1, 4:] = 0, 0
        expected = stack(x, attention_mask=mask)
        x[mask == 0] = value
        actual = stack(x, attention_mask=mask)
        assert torch.equal(actual[mask == 1], expected[mask == 1])

    @pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0, 5, 16), (0, 1, 16), (2, 3, 0, 16)], ids=str)
    @torch.no_grad()
    def test_no_tokens_have_no_output(self, shape):
        assert self.layer()(torch.empty(shape)).shape == (*shape[:-1], 8)

    @torch.no_grad()
    def test_no_tokens_in_a_stack(self):
        stack = Stack(self.layer(), TokenContext(0))
        assert stack(torch.empty(2, 0, 16), attention_mask=torch.empty(2, 0)).shape == (2, 0, 8)

    @pytest.mark.parametrize(
        ("inputs", "what"),
        [
            ({"cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32)}, "packed into one .cu_seq_lens_q"),
            ({"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])}, "packed into one .seq_idx"),
            ({"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, "position_ids that start again within a row"),
        ],
    )
    def test_rows_of_several_sequences_are_refused(self, inputs, what):
        stack = Stack(self.layer(), TokenContext(0))
        sentence = f"expected one sequence a row for clact.*got .*{what}.*; use generate with"
        with pytest.raises(ValueError, match=sentence):
            stack(torch.randn(1, 5, 16), **inputs)

    def test_positions_of_padding_do_not_count(self):
        stack = Stack(self.layer(), TokenContext(0))
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
        stack(torch.randn(2, 5, 16), attention_mask=mask, position_ids=torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 1]]))

    @pytest.mark.parametrize("recipe", [CLACT, FIRST], ids=["clact", "first tokens"])
    def test_generate_batch(self, recipe):
        """First tokens are told by the positions of each request; clact is refused, in each request's error."""
        model = sparse(**recipe)
        prompts = [[3, 4, 5, 6, 7], [9, 10, 11]]
        config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
        sizes = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=sizes)
        for prompt, output in zip(prompts, outputs.values(), strict=True):
            if "criterion" in recipe:
                assert output.error.startswith("expected one sequence a row for clact")
                assert output.generated_tokens == []
            else:
                alone = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None)
                assert output.generated_tokens == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("mitigation", [(), ("dpts-mean",), ("dpts-median",), ("spts",)])
def test_clact_has_one_formula_for_any_number_of_tokens(mitigation):
    """A token that stands alone is selected as one of two equal tokens, whose norms rank alike."""
    torch.manual_seed(2)
    layer = NMLinear.from_linear(nn.Linear(64, 32), LinearSpec("2:4", mitigation=mitigation, **CLACT))
    if "spts" in mitigation:
        layer.set_data(shift=torch.randn(64))
    x = torch.randn(64) + 0.7
    expected = layer(x.expand(1, 2, 64))[0, 1]
    for shape in ((64,), (1, 64), (1, 1, 64)):
        assert_close(layer(x.view(shape)).flatten(), expected)
