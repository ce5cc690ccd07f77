"""Encoders, and encoder-decoders; those of tests/models.py are not repeated."""

from building import CLASSES, TOKENS, VOCABULARY, Table, classes, rows, token_ids

TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=4 * TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=CLASSES,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attention_dropout=0.0, dropout=0.0,
)  # fmt: skip
RELATIVE = dict(relative_attention=True, pos_att_type=["p2c", "c2p"])
MASKED: Table = {
    "roberta": {}, "electra": dict(embedding_size=16), "mpnet": {}, "distilbert": dict(hidden_dim=64),
    "albert": dict(embedding_size=16), "deberta": RELATIVE, "deberta-v2": dict(RELATIVE, norm_rel_ebd="layer_norm"),
    "modernbert": dict(local_attention=8, cls_token_id=1, sep_token_id=2), "camembert": {}, "megatron-bert": {},
    "mobilebert": dict(intra_bottleneck_size=16, embedding_size=16, true_hidden_size=16), "fnet": {},
    "squeezebert": dict(embedding_size=32), "convbert": dict(embedding_size=32, head_ratio=1),
    "roformer": dict(embedding_size=32),
    "rembert": dict(input_embedding_size=16, output_embedding_size=16),
    "big_bird": dict(attention_type="original_full"),
    "longformer": dict(attention_window=8), "esm": dict(mask_token_id=3, position_embedding_type="rotary"),
    "eurobert": {}, "yoso": {}, "xmod": dict(languages=["a"], default_language="a"),
}  # fmt: skip
CLASSIFIED: Table = {
    "canine": dict(num_hash_functions=2, num_hash_buckets=64, downsampling_rate=4, local_transformer_stride=8),
    "layoutlm": {},
}
TWO_STACKS = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    decoder_start_token_id=0,
)  # fmt: skip
T5 = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0)
TRANSLATED: Table = {
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "blenderbot", "blenderbot-small", "m2m_100"), TWO_STACKS),
    "led": dict(
        TWO_STACKS, attention_window=8, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64
    ),
    "mt5": T5, "umt5": T5, "longt5": dict(T5, local_radius=7),
    "switch_transformers": dict(
        T5, num_experts=4, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
    ),
}  # fmt: skip


def _inputs(_):
    ids = token_ids()
    return {"input_ids": ids, "labels": ids}


def _classified(_):
    return {"input_ids": token_ids(), "labels": classes()}


BUILDERS = {
    **rows("AutoModelForMaskedLM", MASKED, TEXT, _inputs),
    **rows("AutoModelForSequenceClassification", CLASSIFIED, TEXT, _classified),
    **rows("AutoModelForSeq2SeqLM", TRANSLATED, TEXT, _inputs),
}
