"""A tiny Llama, what it trains on, and the bytes that a whole training run saves for backward."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, TOKENS, BATCH = 64, 16, 4
EXACT = {"options": {"preset": "exact"}}
ENCODED = {"options": {"time_slack": 10}}  # codecs are worth more time than a model this small takes
# the loss is a mean of 60 terms of some 100 roundings of 2^-24 each, and few steps at a small rate carry it on
LOSS = 1e-6
# a step along a gradient with a relative error e takes the loss down by 1 +- e as much; verdict.limit of the default
DECREASE = 0.02


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
        )
    )  # fmt: skip


def compiled(model: nn.Module, backend: str = "lowmem_eager", **settings: object) -> nn.Module:
    """The model, compiled in place."""
    model.compile(backend=backend, **(settings or EXACT))
    return model


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    found = rows(count * BATCH)
    return [{k: torch.stack([row[k] for row in found[i::count]]) for k in found[0]} for i in range(count)]


class Bytes:
    """What was saved while `counted` was on."""

    total = 0


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[Bytes]:
    """Counts the bytes of every forward inside, whole storages, those of the model's own tensors left out."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    seen: dict[int, StorageWeakRef] = {}
    found = Bytes()

    @torch._dynamo.disable
    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        at = storage.data_ptr()
        if at not in own and (at not in seen or seen[at].expired()):
            seen[at] = StorageWeakRef(storage)
            found.total += storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield found
