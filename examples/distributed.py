"""A small transformer trained on several processes under lowmem, with DDP or, by --fsdp, with FSDP2.

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --fsdp --options '{"preset": "smallest"}'
    torchrun --nproc-per-node 2 examples/distributed.py --backend inductor                           # to compare with

On GPUs by NCCL, else on the CPU by gloo. What torch logs of profilers and of FSDP's views it logs under any backend.
"""

import argparse
import json
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from graphopt.memory import saved_bytes

WIDTH, HEADS, DEPTH, TOKENS, BATCH, VOCABULARY = 128, 4, 2, 64, 8, 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def parallel(model: Decoder, fsdp: bool, **settings: object) -> nn.Module:
    """DDP: compiled as a whole, outside of it. FSDP2: each block compiled before it is sharded."""
    if not fsdp:
        return torch.compile(DistributedDataParallel(model), **settings)
    for block in model.blocks:
        block.compile(**settings)
        fully_shard(block)
    return fully_shard(model)


def batch(device: torch.device, data: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences that count upwards by a step of their own, and what comes next."""
    start, step = torch.randint(VOCABULARY, (BATCH, 1), generator=data), torch.randint(1, 8, (BATCH, 1), generator=data)
    tokens = (start + step * torch.arange(TOKENS + 1)) % VOCABULARY
    return tokens[:, :-1].to(device), tokens[:, 1:].to(device)


def loss_of(model: nn.Module, tokens: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def train(given: argparse.Namespace, device: torch.device) -> None:
    """Print losses and saved bytes. All of it is freed on return: DDP may wait for ever if its group went before it."""
    rank = dist.get_rank()

    torch.manual_seed(0)  # the same weights on every rank
    model = Decoder().to(device)
    compiled = parallel(model, given.fsdp, backend=given.backend, options=given.options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.Generator().manual_seed(rank + 1)  # of its own: some options draw numbers too
    first = batch(device, data)
    kept = saved_bytes(lambda: loss_of(compiled, *first), [*first, *model.parameters()])
    for step in range(given.steps):
        loss = loss_of(compiled, *batch(device, data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        dist.all_reduce(loss)
        if rank == 0 and (step % 10 == 0 or step == given.steps - 1):
            print(f"step {step:3}  loss {loss.item() / dist.get_world_size():.3f}  saved {kept:,} bytes a rank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 in the place of DDP")
    parser.add_argument("--backend", default="lowmem", help="of torch.compile, such as inductor to compare with")
    parser.add_argument("--options", type=json.loads, help="of the backend, as JSON")
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(given, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
