"""Three small transformers of about 5 M parameters, built from their configurations with random weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

LENGTH = 128

# bytes as tokens, and gpt-2's usual dropout of 0.1
GPT2 = {
    "vocab_size": 256,
    "n_positions": LENGTH,
    "n_embd": 256,
    "n_layer": 6,
    "n_head": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}
LLAMA = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": LENGTH,
    "use_cache": False,
}
# four pixels are a token, and there is one of class
VIT = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
    "num_labels": 10,
}
MODELS: dict[str, tuple[type[PreTrainedModel], type[PretrainedConfig], dict[str, Any]]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "vit": (ViTForImageClassification, ViTConfig, VIT),
}


class WithLoss(nn.Module):
    """A transformers model and its cross entropy, so that both are compiled together.

    Forward runs under autocast to bf16 if asked, or, where nothing is said, on a GPU.
    """

    def __init__(self, model: nn.Module, autocast: bool | None = None) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def logits(self, x: Tensor) -> Tensor:
        """What the model makes of a batch, float32."""
        autocast = x.is_cuda if self.autocast is None else self.autocast
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            logits: Tensor = self.model(x).logits
        return logits.float()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss, float32 [], of inputs `x` against targets `y`; targets of -100 do not count."""
        return F.cross_entropy(self.logits(x).flatten(0, -2), y.flatten())


def build(name: str, seed: int) -> WithLoss:
    """The model called `name` (gpt2, llama or vit) in training mode; one seed gives the same weights each time."""
    torch.manual_seed(seed)
    model, config, settings = MODELS[name]
    return WithLoss(model(config(**{**settings, "attn_implementation": "sdpa"}))).train()
