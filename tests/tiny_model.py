"""A random Llama of a few kilobytes with a real tokenizer, saved as a checkpoint folder or as a GGUF file."""

from pathlib import Path

import torch

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TEXT = "The quick brown fox jumps over the lazy dog, and the lazy dog does not mind at all.\n" * 40


def build():
    """Model (float32) and byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **SIZES)
    return LlamaForCausalLM(config).eval(), tokenizer


def another_value(model) -> None:
    """Change one late value of one late parameter."""
    model.model.layers[1].mlp.up_proj.weight.data[-1, -1] += 1


def teacher():
    """A model whose outputs others are trained on: a random one's predictions are all alike, nothing to learn."""
    model, _ = build()
    model.lm_head.weight.data *= 10
    return model.requires_grad_(False)


def windows(count: int, seed: int) -> torch.Tensor:
    """Token windows ``[count, 24]`` for it."""
    return torch.randint(0, 8, (count, 24), generator=torch.Generator().manual_seed(seed))


def save(folder: Path, change=lambda model: None) -> Path:
    """Write the checkpoint into `folder`, after a change of the model."""
    model, tokenizer = build()
    change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_gguf(path: Path) -> Path:
    """Write the same model as a float32 GGUF file."""
    import json

    import gguf

    model, tokenizer = build()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(bpe["vocab"], key=bpe["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in ("<s>", "</s>") else 1 for word in words])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in _gguf_tensors(model):
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_tensors(model):
    config = model.config
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    yield "output.weight", model.lm_head.weight
    for index, layer in enumerate(model.model.layers):
        prefix = f"blk.{index}."
        attention, mlp = layer.self_attn, layer.mlp
        yield prefix + "attn_norm.weight", layer.input_layernorm.weight
        yield prefix + "ffn_norm.weight", layer.post_attention_layernorm.weight
        yield prefix + "attn_q.weight", _interleave(attention.q_proj.weight, config.num_attention_heads)
        yield prefix + "attn_k.weight", _interleave(attention.k_proj.weight, config.num_key_value_heads)
        yield prefix + "attn_v.weight", attention.v_proj.weight
        yield prefix + "attn_output.weight", attention.o_proj.weight
        yield prefix + "ffn_gate.weight", mlp.gate_proj.weight
        yield prefix + "ffn_up.weight", mlp.up_proj.weight
        yield prefix + "ffn_down.weight", mlp.down_proj.weight


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF stores the rotary halves of each head interleaved."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
