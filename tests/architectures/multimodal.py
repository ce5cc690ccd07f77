"""Images with text."""

import torch
from building import BATCH, TOKENS, VOCABULARY, rows, token_ids

SIZE, IMAGE_TOKENS = 32, 16
LAYERS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32)
TEXT = LAYERS | dict(
    vocab_size=VOCABULARY, max_position_embeddings=4 * TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attention_dropout=0.0,
)  # fmt: skip
VISION = LAYERS | dict(image_size=SIZE, patch_size=8)
IMAGE_TOKEN = 2  # no random token is below 3
PAIRED = "clip", "siglip", "blip", "altclip", "chinese_clip", "metaclip_2"
READERS = {
    "llava": dict(
        text_config=dict(TEXT, model_type="llama"), vision_config=dict(VISION, model_type="clip_vision_model"),
        vision_feature_layer=-1,
    ),
    "paligemma": dict(
        text_config=dict(TEXT, model_type="gemma", head_dim=16, num_key_value_heads=1),
        vision_config=dict(VISION, model_type="siglip_vision_model", vision_use_head=False),
    ),
}  # fmt: skip


def _pixels():
    return torch.randn(BATCH, 3, SIZE, SIZE)


def _pairs(_):
    return {"input_ids": token_ids(), "pixel_values": _pixels(), "return_loss": True}


def _captions(_):
    ids = token_ids()
    return {"input_ids": ids, "pixel_values": _pixels(), "labels": ids}


def _prompts(_):
    ids = token_ids(2 * IMAGE_TOKENS)
    ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE_TOKEN
    return {"input_ids": ids, "pixel_values": _pixels(), "labels": ids}


BUILDERS = {
    **rows("AutoModel", {family: {} for family in PAIRED},
           dict(text_config=TEXT, vision_config=VISION, projection_dim=32), _pairs),
    **rows("AutoModelForCausalLM", {"git": dict(TEXT, vision_config=VISION)}, {}, _captions),
    **rows("AutoModelForImageTextToText", READERS,
           dict(image_token_index=IMAGE_TOKEN, image_token_id=IMAGE_TOKEN, projection_dim=32), _prompts),
}  # fmt: skip
