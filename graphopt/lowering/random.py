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


def fuse_seeds(gm: fx.GraphModule) -> None:
    """Draw all seeds that `uniform` asked for at once: one kernel for each device."""
    with V.set_fake_mode(fake_mode(gm.graph)):
        fuse_seed_creation_pass(gm.graph)
