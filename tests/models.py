"""Tiny transformers models, built from configs with random weights, and a loss for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Tensor]]
VOCABULARY, TOKENS, BATCH = 64, 16, 2


def _tokens(**more: Tensor) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    return {"input_ids": ids, "labels": ids, **more}


def gpt2(**overrides: float) -> Built:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, **overrides,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), _tokens()


def llama() -> Built:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config), _tokens()


def gemma3() -> Built:
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config), _tokens()


def t5() -> Built:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), _tokens()


def bert() -> Built:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=TOKENS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config), _tokens()


def vit() -> Built:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(BATCH, 1, 8, 8), "labels": torch.randint(0, 10, (BATCH,))}
    return transformers.ViTForImageClassification(config), inputs


MODELS: dict[str, Callable[..., Built]] = {
    "gpt2": lambda: gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": llama, "gemma3": gemma3, "t5": t5, "bert": bert, "vit": vit,
}  # fmt: skip


def build(name: str) -> Built:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():  # random norms, so that a forgotten weight or bias shows
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model.train(), inputs


def loss(model: Callable[..., object], inputs: dict[str, Tensor]) -> Tensor:
    if "use_cache" in getattr(getattr(model, "config", None), "__dict__", {}):
        return model(**inputs, use_cache=False).loss  # type: ignore[attr-defined]
    return model(**inputs).loss  # type: ignore[attr-defined]
