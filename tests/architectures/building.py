"""Tiny transformers models of any family: what its kind has in common, and what is its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from models import Built
from torch import Tensor, nn

Table = dict[str, dict[str, Any]]
VOCABULARY, TOKENS, BATCH, CLASSES = 64, 16, 4, 10


def rows(
    kind: str, table: Table, common: Mapping[str, Any], inputs: Callable[[str], dict[str, Tensor]]
) -> dict[str, Any]:
    """A builder for each row: `kind` is the class of models, such as AutoModelForCausalLM."""

    def builder(family: str, own: dict[str, Any]) -> Callable[[], Built]:
        def build(**more: Any) -> Built:
            config = transformers.AutoConfig.for_model(family, **{**common, **own, **more})
            return getattr(transformers, kind).from_config(config), inputs(family)

        return build

    return {family: builder(family, own) for family, own in table.items()}


def token_ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, tokens))  # the first three are special


def classes() -> Tensor:
    return torch.randint(0, CLASSES, (BATCH,))


def trained(builder: Callable[[], Built]) -> Built:
    """A model in training mode whose norms are random, so that a forgotten weight or bias shows."""
    torch.manual_seed(0)
    model, inputs = builder()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    if "use_cache" in getattr(getattr(model, "config", None), "__dict__", {}):
        model.config.use_cache = False
    return model.train(), inputs
