"""Names of the linear layers of decoder blocks, by family."""

DEFAULT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a Llama-like decoder block; in a recipe they stand for the whole block of any family."""

ROLES = {
    **{name: (name,) for name in DEFAULT_PROJECTIONS},
    # Phi, OPT, StarCoder2, GPT-2, GPT-J, CodeGen, Falcon, GPT-NeoX, BLOOM, Persimmon, MPT, DBRX, GPT-BigCode
    "dense": ("o_proj",),
    "out_proj": ("o_proj",),
    "fc1": ("up_proj",),
    "fc2": ("down_proj",),
    "fc_in": ("up_proj",),
    "fc_out": ("down_proj",),
    "c_fc": ("up_proj",),
    "c_proj": ("o_proj", "down_proj"),
    "dense_h_to_4h": ("up_proj",),
    "dense_4h_to_h": ("down_proj",),
    # one layer for several roles: Falcon, GPT-NeoX, BLOOM; GPT-2, GPT-BigCode; MPT, DBRX; Phi-3, CodeGen; GLM, Phi-3
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "Wqkv": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    # several layers for one role: DeepSeek's latent attention
    "q_a_proj": ("q_proj",),
    "q_b_proj": ("q_proj",),
    "kv_a_proj_with_mqa": ("k_proj", "v_proj"),
    "kv_b_proj": ("k_proj", "v_proj"),
    # LFM2
    "w1": ("gate_proj",),
    "w2": ("down_proj",),
    "w3": ("up_proj",),
}
"""Projection of a model family -> its roles in a Llama-like block."""
