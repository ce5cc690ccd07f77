"""A small decoder that can be trained in every parallel way, its batches, and what is measured of a step of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.nn import functional as F
from training import Gradients

from graphopt.graph import tensor
from graphopt.memory import saved_bytes
from graphopt.split import split

DEPTH, WIDTH, HEAD, TOKENS, BATCH, VOCABULARY = 2, 128, 32, 32, 8, 64
# two orders of the same float32 roundings: neither is nearer to the exact gradient than the other by more than a factor
ORDER = 3

# of a block
TENSOR_PARALLEL = {
    **{each: ColwiseParallel() for each in ("q", "k", "v", "up")}, "o": RowwiseParallel(), "down": RowwiseParallel(),
}  # fmt: skip
# of the whole model: between linears each rank has its own tokens
SEQUENCE_PARALLEL = {
    "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    **{f"blocks.*.{each}": ColwiseParallel(input_layouts=Shard(1)) for each in ("q", "k", "v", "up")},
    **{f"blocks.*.{each}": RowwiseParallel(output_layouts=Shard(1)) for each in ("o", "down")},
    **{each: SequenceParallel() for each in ("blocks.*.norm1", "blocks.*.norm2", "norm")},
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (linear(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(depth: int = DEPTH) -> Decoder:
    torch.manual_seed(0)
    return Decoder(depth)


def batch(rank: int = 0, world: int = 1) -> Tensor:
    """A rank's equal part of one batch."""
    tokens = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    return tokens.chunk(world)[rank]


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())


def eager(dtype: torch.dtype = torch.float32, depth: int = DEPTH) -> Gradients:
    """The gradients of one process on the whole batch."""
    model = build(depth).to(dtype)
    loss_of(model(batch()), batch()).backward()
    return gathered(model)


def gathered(model: nn.Module) -> Gradients:
    """The gradients, those of shards put together; under the names that the model itself has."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            name = name.replace("_orig_mod.", "").removeprefix("module.")
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().clone()
    return found


def step(forward: Callable[[Tensor], Tensor], tokens: Tensor, own: Iterable[Tensor] = ()) -> int:
    """A step of training, compiled anew; the bytes saved between forward and backward."""
    torch._dynamo.reset()
    losses: list[Tensor] = []
    kept = saved_bytes(lambda: losses.append(loss_of(forward(tokens), tokens)), [tokens, *own])
    losses[0].backward()
    return kept


@dataclass
class Recorded:
    """What lowmem made of one joint graph, as plain data that ranks can compare.

    Names of nodes are left out: a rank that takes its own part of a tensor, say the second, names it by that.
    """

    forward: list[str]
    backward: list[str]
    plan: dict[str, Any] | None
    collectives: Counter[str]
    collectives_before: Counter[str]

    @property
    def decisions(self) -> Counter[str]:
        return Counter(choice["decision"] for choice in self.plan["choices"]) if self.plan else Counter()


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """The joint graphs that lowmem splits meanwhile."""
    found: list[Recorded] = []

    def recording(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        before = collectives(operators(gm.graph))
        halves = split(gm, *args, **kwargs)
        forward, backward = operators(halves.forward.graph), operators(halves.backward.graph)
        plan = asdict(halves.planning.plan) | {"graph": None} if halves.planning else None
        for choice in plan["choices"] if plan else ():
            del choice["node"]
        found.append(Recorded(forward, backward, plan, collectives(forward + backward), before))
        return halves

    with mock.patch("graphopt.backend.split", recording):
        yield found


def operators(graph: fx.Graph) -> list[str]:
    """In their order, with the shapes of what they give."""
    return [f"{node.target} {getattr(tensor(node), 'shape', '')}" for node in graph.nodes if node.op == "call_function"]


def collectives(operators: Iterable[str]) -> Counter[str]:
    return Counter(each for each in operators if each.startswith("_c10d_functional") and "wait_tensor" not in each)
