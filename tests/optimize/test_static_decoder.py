"""StaticDecoder: the tokens that generate() gives, from a cache that is allocated once."""

import re
from types import SimpleNamespace

import pytest
import torch
from tiny_families import IDS, KNOWN, family, sparse

import nm_act
from nm_act.optimize import static_attention

pytestmark = pytest.mark.contract


def reference(model, ids, new_tokens):
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("batch", [1, 2])
def test_generates_what_transformers_generates(name, batch):
    model = sparse(name, "8:16")
    nm_act.optimize(model)
    decoder = nm_act.StaticDecoder(model, batch=batch, max_tokens=32)
    before = model.config._attn_implementation
    for tokens in (12, 3):  # a shorter prompt over a used cache
        ids = IDS[:batch, :tokens]
        assert torch.equal(decoder.generate(ids, 9), reference(model, ids, 9))
    assert model.config._attn_implementation == before


def test_steps_go_on_from_any_state():
    model = family("llama")
    decoder = nm_act.StaticDecoder(model, max_tokens=15)
    expected = reference(model, IDS[:1], 4)
    assert decoder.prefill(IDS[:1]).item() == expected[0, 12]
    assert [decoder.step().item() for _ in range(3)] == expected[0, 13:].tolist()
    with pytest.raises(ValueError, match=r"expected 1 to 14 tokens in the cache of 15, got 15"):
        decoder.step()


def test_wrong_uses_are_one_sentence():
    model = family("llama")
    decoder = nm_act.StaticDecoder(model, max_tokens=14)
    for sentence, call in (
        ("expected 1 to 13 tokens in the cache of 14, got 0; call prefill", decoder.step),
        ("expected a prompt of shape [1, tokens], got [2, 12]", lambda: decoder.prefill(IDS)),
        ("within the cache of 14, got 12 + 4; make a decoder", lambda: decoder.generate(IDS[:1], 4)),
        ("expected at least one new token, got 0", lambda: decoder.generate(IDS[:1], 0)),
        ("expected integers batch >= 1", lambda: nm_act.StaticDecoder(model, batch=0, max_tokens=14)),
        ("expected integers batch >= 1", lambda: nm_act.StaticDecoder(model, max_tokens=32.5)),
        ("expected a prompt of token ids, got torch.float32", lambda: decoder.prefill(IDS[:1].float())),
        (
            "expected a Transformers model, got Linear without",
            lambda: nm_act.StaticDecoder(torch.nn.Linear(2, 2), max_tokens=32),
        ),
        ("expected a model in memory", lambda: nm_act.StaticDecoder("model", max_tokens=32)),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
            call()
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="expected a model on one device, got cpu, meta"):
        nm_act.StaticDecoder(model, max_tokens=14)


def test_captures_need_cuda():
    decoder = nm_act.StaticDecoder(family("llama"), max_tokens=14)
    for capture in (decoder.capture_step, lambda: decoder.capture_prefill(4)):
        with pytest.raises(ValueError, match="expected a model on CUDA to capture, got one on cpu; call prefill and"):
            capture()


def test_captures_leave_the_running_sequence(monkeypatch):
    """What a capture runs, without the graph: its warm-up writes to the cache, the position and the token."""

    def run(self, function, before):
        for _ in range(3):
            function()
        before()
        return function

    monkeypatch.setattr(nm_act.StaticDecoder, "_captured", run)
    monkeypatch.setattr(nm_act.StaticDecoder, "_check_graphs", lambda self: None)
    model = family("llama")
    expected = reference(model, IDS[:1], 6)[0, 12:].tolist()
    decoder = nm_act.StaticDecoder(model, max_tokens=24)
    decoder.capture_prefill(20)  # before anything was read
    tokens = [decoder.prefill(IDS[:1]).item(), decoder.step().item()]
    logits = decoder.logits.clone()
    for capture in (lambda: decoder.capture_prefill(7), lambda: decoder.capture_prefill(15), decoder.capture_step):
        capture()
        assert torch.equal(decoder.logits, logits)
        assert decoder.token.item() == tokens[-1]
        tokens.append(decoder.step().item())
        logits = decoder.logits.clone()
    assert [*tokens, decoder.step().item()] == expected
    with pytest.raises(ValueError, match=r"within the cache of 24, got 25 \+ 1"):
        decoder.capture_prefill(25)


def test_dense_first_tokens_have_no_graph(monkeypatch):
    model = sparse(dense_first_tokens=2)
    ids = IDS[:1]
    decoder = nm_act.StaticDecoder(model, max_tokens=24)  # a CPU runs everything directly
    assert torch.equal(decoder.generate(ids, 5), reference(model, ids, 5))
    monkeypatch.setattr(model, "parameters", lambda: [SimpleNamespace(device=torch.device("cuda", 0))])
    with pytest.raises(ValueError, match="expected a recipe without dense_first_tokens, which no CUDA"):
        nm_act.StaticDecoder(model, max_tokens=24)


def flash(query, key, value, starts, ends, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k=None):
    """What torch documents of its varlen_attn, in float64: packed sequences ``[tokens, heads, dim]``, all equally long."""
    batch, groups = len(starts) - 1, query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    assert starts.tolist() == [max_q * i for i in range(batch + 1)]
    assert ends.tolist() == [max_k * i for i in range(batch + 1)]
    query, key, value = (tensor.double().unflatten(0, (batch, -1)) for tensor in (query, key, value))
    used = max_k if seqused_k is None else seqused_k.item()
    key, value = (tensor[:, :used].repeat_interleave(groups, dim=2) for tensor in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    behind = torch.arange(used - max_q, used)[:, None] - torch.arange(used)
    left, right = window_size
    inside = ((behind <= left) | (left < 0)) & ((behind >= -right) | (right < 0))
    weights = scores.masked_fill(~inside, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(0, 1).float()


def private_flash(query, key, value, *arguments, **options):
    *arguments, dropout, causal, debug = arguments
    assert (dropout, causal, debug) == (0.0, False, False)
    window = options.pop("window_size_left"), options.pop("window_size_right")
    return (
        flash(query, key, value, *arguments, window_size=window, enable_gqa=query.shape[1] > key.shape[1], **options),
    )


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("public", [True, False])
def test_flash_attention_is_asked_for_the_same(window, tokens, groups, public, monkeypatch):
    """The sequences of a batch as heads of one, windows that count the query: the arguments mean what the masks do."""
    if public:
        monkeypatch.setattr(static_attention, "varlen_attn", flash)
    else:  # torch 2.11
        monkeypatch.setattr(static_attention, "_varlen_options", frozenset())
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", private_flash)
    key, value = torch.randn(2, 3, 2, 20, 8)  # batch, key heads, cache, dim
    query, length = torch.randn(3, 2 * groups, tokens, 8), 12
    options = {"scaling": 0.3, "sliding_window": window}
    options["attention_mask"] = torch.full((3, 1, 1, 1), length, dtype=torch.int32)
    masked, _ = static_attention.static_attention(None, query, key, value, **options)
    for windowed in (False, True):
        case = static_attention._case(2 * groups, 2, 8, windowed, torch.float32, query.device)
        monkeypatch.setitem(static_attention._fits, case, True)
    fast, _ = static_attention.static_attention(None, query, key, value, **options)
    torch.testing.assert_close(fast, masked)


def test_masks_on_a_gpu_do_not_go_to_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with static_attention._no_cudnn(SimpleNamespace(is_cuda=True)):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


# ---- generate() of Transformers with this attention ------------------------------------------------------------------
@pytest.fixture
def chosen():
    """A function that optimizes a family's sparse model and chooses the attention for it."""

    def make(name="llama", **fields):
        model = sparse(name, "8:16", **fields)
        nm_act.optimize(model)
        model.set_attn_implementation(static_attention.ATTENTION)
        return model

    return make


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("cache", ["static", None])
def test_generate_uses_it_by_name(name, cache, chosen):
    model = chosen(name)
    expected = reference(sparse(name, "8:16"), IDS, 9)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, cache_implementation=cache, **options), expected)
    chunks = model.generate(IDS, cache_implementation=cache, prefill_chunk_size=5, **options)
    assert torch.equal(chunks, expected)


def test_padding_is_refused_in_a_sentence(chosen):
    model = chosen()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=r"without padding for attention nm_act_static, got .* 3 padded"):
        model.generate(IDS, attention_mask=mask, max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("q_length", [1, 6])
def test_masks_that_are_neither_causal_nor_a_window_remain(q_length):
    """Chunked attention, say: the number of filled tokens would not tell it."""
    from transformers.masking_utils import causal_mask_function, chunked_causal_mask_function, sdpa_mask

    chunked = chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int))
    sizes = {"batch_size": 2, "q_length": q_length, "kv_length": 9, "q_offset": 0 if q_length > 1 else 6}
    options = {**sizes, "mask_function": chunked, "local_size": 4, "config": SimpleNamespace(sliding_window=None)}
    expected = sdpa_mask(**sizes, mask_function=chunked, allow_is_causal_skip=False)
    assert torch.equal(static_attention.static_mask(**options, dtype=torch.float32), expected)
    options |= {"mask_function": causal_mask_function, "local_size": None}
    mask = static_attention.static_mask(**options, dtype=torch.float32)
    assert mask is None if q_length > 1 else mask.flatten().tolist() == [7, 7]


def one_step(query, key, value, _starts, _ends, _max_q, max_k, *, scale, window_size, enable_gqa, seqused_k):
    """varlen_attn for one query, of which a compiler can follow each operation."""
    assert window_size == (-1, -1)
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(torch.arange(max_k) >= seqused_k, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value)


@pytest.mark.parametrize("attn", ["sdpa", static_attention.ATTENTION, "flash"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_generate_compiles_its_steps_to_one_graph(attn, backend, chosen, monkeypatch):
    """What reduce-overhead puts into CUDA graphs: one graph without breaks for all steps after the prompt."""
    if attn == "flash":
        attn = static_attention.ATTENTION
        monkeypatch.setattr(static_attention, "varlen_attn", one_step)
        case = static_attention._case(4, 2, 16, False, torch.float32, torch.device("cpu"))
        monkeypatch.setitem(static_attention._fits, case, True)
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    torch._dynamo.reset()
    counters.clear()
    model = chosen()
    model.set_attn_implementation(attn)
    expected = reference(model, IDS, 9)
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    assert torch.equal(model.generate(IDS, compile_config=config, **options), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
