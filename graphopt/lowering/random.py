"""Random numbers in a joint graph whose own have been replaced by Inductor's already."""

from __future__ import annotations

import torch
import torch._inductor.config as inductor_config
from torch import Tensor, fx
from torch._inductor.fx_passes.replace_random import fuse_seed_creation_pass
from torch._inductor.virtualized import V

from graphopt.graph import fake_mode

prims = torch.ops.prims


def uniform(like: Tensor) -> Tensor:
    """float32 in [0, 1) of like's shape: drawn from a seed inside the kernel that reads it, as Inductor does.

    With `fallback_random` it is torch.rand. Either follows torch.manual_seed.
    """
    if inductor_config.fallback_random:
        return torch.rand(like.shape, device=like.device)
    return prims.inductor_random(like.shape, prims.inductor_seed(like.device), "rand")  # type: ignore[no-any-return]


def seed(device: torch.device) -> Tensor:
    """int64, no dims: another at each call; it follows torch.manual_seed."""
    if inductor_config.fallback_random:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    return prims.inductor_seed(device)  # type: ignore[no-any-return]


def fuse_seeds(gm: fx.GraphModule) -> None:
    """Draw all seeds that were asked for at once, one kernel for each device, behind the graph's own."""
    graph = gm.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in graph.find_nodes(op="call_function", target=prims.inductor_seeds.default):
        if node is not first:
            first.prepend(node)  # the model's own random numbers stay as they were
    with V.set_fake_mode(fake_mode(gm.graph)):
        fuse_seed_creation_pass(gm.graph)
