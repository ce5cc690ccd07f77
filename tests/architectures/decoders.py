"""Decoders, mixtures of experts and recurrent models; those of tests/models.py are not repeated."""

from building import VOCABULARY, Table, rows, token_ids

# most configs know these names by an attribute map; what a family calls otherwise, or must have, is in its row
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attention_dropout=0.0, dropout=0.0, hidden_dropout=0.0,
)  # fmt: skip
SHARED_HEADS = dict(num_key_value_heads=1, head_dim=16)
DECODERS: Table = {
    "gpt_bigcode": {}, "gptj": dict(rotary_dim=8), "gpt_neox": {}, "bloom": {}, "mpt": {}, "falcon": {},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], num_layers=2, window_size=8),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32), "ctrl": dict(dff=64),
    "biogpt": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "mistral": dict(num_key_value_heads=1, sliding_window=8), "qwen2": dict(num_key_value_heads=1),
    "qwen3": SHARED_HEADS, "gemma": SHARED_HEADS, "gemma2": dict(head_dim=16, sliding_window=8),
    "phi": {}, "phi3": {}, "olmo": {}, "olmo2": {}, "granite": {}, "cohere": {}, "cohere2": dict(sliding_window=8),
    "stablelm": {}, "starcoder2": dict(residual_dropout=0.0, embedding_dropout=0.0), "persimmon": {}, "smollm3": {},
    "nemotron": dict(head_dim=16), "helium": dict(head_dim=16), "glm4": dict(head_dim=16), "diffllama": {},
    "ernie4_5": dict(head_dim=16), "hunyuan_v1_dense": dict(head_dim=16), "exaone4": {}, "nanochat": {}, "arcee": {},
    "apertus": {}, "doge": {},
}  # fmt: skip
FOUR = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MIXTURES: Table = {
    "mixtral": dict(num_local_experts=4), "granitemoe": dict(num_local_experts=4),
    "phimoe": dict(num_local_experts=4, router_jitter_noise=0.0, input_jitter_noise=0.0),
    "gpt_oss": dict(num_local_experts=4, head_dim=16), "jetmoe": dict(num_local_experts=4, kv_channels=16),
    "qwen2_moe": dict(FOUR, shared_expert_intermediate_size=32), "qwen3_moe": dict(FOUR, head_dim=16), "olmoe": FOUR,
    "llama4_text": dict(num_local_experts=4, intermediate_size_mlp=64, head_dim=16),
    "deepseek_v3": dict(
        n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, moe_intermediate_size=32, first_k_dense_replace=1,
    ),
}  # fmt: skip
RECURRENT: Table = {
    "mamba": {}, "falcon_mamba": {}, "rwkv": {}, "lfm2": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=1, chunk_size=16, state_size=16),
    "recurrent_gemma": dict(lru_width=32, attention_window_size=16),
    "jamba": dict(num_experts=2, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1),
    "bamba": dict(
        mamba_n_heads=4, mamba_d_head=16, mamba_chunk_size=16, mamba_d_state=16, mamba_n_groups=1,
        attn_layer_indices=[1],
    ),
}  # fmt: skip


def _inputs(_):
    ids = token_ids()
    return {"input_ids": ids, "labels": ids}


BUILDERS = rows("AutoModelForCausalLM", DECODERS | MIXTURES | RECURRENT, TEXT, _inputs)
