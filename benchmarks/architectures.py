"""The transformers models that are trained here: from configurations, with random weights; in full or through LoRA."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

RANK = 8
# bytes are the tokens of the small models; a ViT's tokens are patches, and one of class
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": {
        "tiny": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 256},
        "mini": {"n_embd": 512, "n_layer": 2, "n_head": 8, "n_positions": 1024, "vocab_size": 256},
        "small": {},
    },
    "llama": {
        "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "vocab_size": 256, "max_position_embeddings": 512},
        "mini": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "num_attention_heads": 8,
                 "vocab_size": 256, "max_position_embeddings": 1024},
        "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
               "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072},
    },
    "bert": {
        "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "vocab_size": 256},
        "mini": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8,
                 "vocab_size": 256},
        "base": {},
    },
    "vit": {
        "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "image_size": 8, "patch_size": 2, "num_channels": 1},
        "mini": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8,
                 "image_size": 256, "patch_size": 16},
        "base": {},
        "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    },
}  # fmt: skip
FAMILIES = tuple(SIZES)
CLASSES: dict[str, tuple[type[PreTrainedModel], type[PretrainedConfig]]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
    "bert": (BertForSequenceClassification, BertConfig),
    "bert-masked": (BertForMaskedLM, BertConfig),
    "vit": (ViTForImageClassification, ViTConfig),
}
GENERATES = ("gpt2", "llama")
# which linears get an adapter: all of them, or of a ViT attention's alone, as LowMemoryBP has it
ADAPTED: dict[str, str | list[str]] = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": "all-linear",
    "bert": ["query", "key", "value", "dense"],
    "vit": ["q_proj", "v_proj"],
}


@dataclass(frozen=True)
class Spec:
    """A model: its family, its size, whether LoRA trains it, and fields of its configuration that differ."""

    family: str
    size: str
    lora: bool = False
    changes: tuple[tuple[str, Any], ...] = ()

    def config(self) -> PretrainedConfig:
        family = self.family.removesuffix("-masked")
        small = SIZES[family][self.size].get("vocab_size") == 256
        bytes_only = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None} if small else {}
        no_cache = {"use_cache": False} if family in GENERATES else {}
        fields = {**SIZES[family][self.size], **bytes_only, **no_cache, **dict(self.changes)}
        return CLASSES[self.family][1](**fields, attn_implementation="sdpa")


def build(spec: Spec) -> PreTrainedModel:
    """The model in training mode, without adapters; torch.manual_seed decides its weights."""
    return CLASSES[spec.family][0](spec.config()).train()


def adapted(model: PreTrainedModel, spec: Spec) -> nn.Module:
    """The model itself, or frozen and with adapters of rank 8; the head of a classifier stays trained."""
    if not spec.lora:
        return model
    head = [] if spec.family in GENERATES else ["classifier"]
    # fan_in_fan_out: GPT-2's linears hold their weights transposed
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=ADAPTED[spec.family],
        modules_to_save=head,
        fan_in_fan_out=spec.family == "gpt2",
    )
    return get_peft_model(model, config)


def batch(spec: Spec, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random inputs and targets: tokens int64 [size, length], or images float32 [size, channels, height, width].

    An image has the length that its model's configuration says.
    """
    config = spec.config()
    if spec.family == "vit":
        shape = size, config.num_channels, config.image_size, config.image_size
        return torch.randn(shape, generator=generator), torch.randint(config.num_labels, (size,), generator=generator)
    x = torch.randint(config.vocab_size, (size, length), generator=generator)
    if spec.family == "bert":
        return x, torch.randint(config.num_labels, (size,), generator=generator)
    return x, torch.randint(config.vocab_size, (size, length), generator=generator)
