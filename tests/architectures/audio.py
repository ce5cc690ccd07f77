"""Audio: waves, and spectra."""

import torch
from building import BATCH, CLASSES, TOKENS, VOCABULARY, Table, classes, rows, token_ids

BANDS, FRAMES = 16, 64
COMMON = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_labels=CLASSES,
    layerdrop=0.0, apply_spec_augment=False, mask_time_prob=0.0, hidden_dropout=0.0, activation_dropout=0.0,
    attention_dropout=0.0, feat_proj_dropout=0.0, feat_quantizer_dropout=0.0, final_dropout=0.0,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
CONVOLUTIONS = dict(
    vocab_size=VOCABULARY, conv_dim=(16, 16), conv_kernel=(10, 5), conv_stride=(5, 4), num_feat_extract_layers=2,
    num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, classifier_proj_size=32, feat_extract_norm="group",
)  # fmt: skip
WAVES: Table = {
    "wav2vec2": {}, "hubert": {}, "unispeech": {}, "unispeech-sat": {}, "sew": dict(squeeze_factor=2),
    "wavlm": dict(num_buckets=16, max_bucket_distance=32), "data2vec-audio": dict(conv_pos_kernel_size=7),
    "wav2vec2-conformer": dict(conv_depthwise_kernel_size=7, conformer_conv_dropout=0.0),
}  # fmt: skip
PATCHES: Table = {
    "audio-spectrogram-transformer": dict(
        patch_size=8, frequency_stride=8, time_stride=8, max_length=FRAMES, num_mel_bins=BANDS
    )
}
WRITTEN: Table = {
    "whisper": dict(
        vocab_size=VOCABULARY, num_mel_bins=BANDS, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=FRAMES // 2, max_target_positions=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )
}  # fmt: skip


def _waves(_):
    return {"input_values": torch.randn(BATCH, 1600), "labels": classes()}


def _patches(_):
    return {"input_values": torch.randn(BATCH, FRAMES, BANDS), "labels": classes()}


def _spoken(_):
    return {"input_features": torch.randn(BATCH, BANDS, FRAMES), "labels": token_ids()}


BUILDERS = {
    **rows("AutoModelForAudioClassification", WAVES, COMMON | CONVOLUTIONS, _waves),
    **rows("AutoModelForAudioClassification", PATCHES, COMMON, _patches),
    **rows("AutoModelForSpeechSeq2Seq", WRITTEN, {}, _spoken),
}
