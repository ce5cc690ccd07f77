"""All ranks make the same plan, whatever their data, their memory and the order of their hashes."""

from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from decoder import TOKENS, VOCABULARY, build, recorded, step
from launch import launch

SETTINGS = {"budget": {"memory_budget": 0.25}, "smallest": {"preset": "smallest"}}


def graphs(options):
    """What a rank makes of a step on data of its own, with a hash seed of its own."""
    model = build(depth=1)
    tokens = torch.randint(VOCABULARY, (8, TOKENS), generator=torch.Generator().manual_seed(dist.get_rank()))
    with recorded() as found:
        step(torch.compile(model, backend="lowmem_eager", options=options), tokens)
    return [asdict(each) for each in found]


def ranks():
    rank = dist.get_rank()
    held = [torch.ones(rank * 2**24), *(object() for _ in range(rank * 1000))]  # less free memory, other addresses
    found = {name: graphs(options) for name, options in SETTINGS.items()}
    del held
    return found


@pytest.fixture(scope="module")
def found(request):
    return launch(ranks, 4 if request.config.getoption("--long") else 2)


@pytest.mark.parametrize("name", SETTINGS)
def test_all_ranks_make_the_same_plan(found, name):
    first, *others = (graphs[name] for graphs in found)
    assert first and all(graph["plan"]["choices"] for graph in first)
    assert all(each == first for each in others)
