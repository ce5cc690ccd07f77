"""What goes wrong on a rank is shown, and the next function finds new ranks."""

import os
import time

import launch as launching
import pytest
import torch.distributed as dist
from launch import launch


def seeds():
    return dist.get_rank(), os.environ["PYTHONHASHSEED"]


def fail():
    if dist.get_rank() == 1:
        raise ValueError("the second rank says why")
    dist.barrier()


def hang():
    time.sleep(1000)


def test_each_rank_has_a_hash_seed_of_its_own():
    assert launch(seeds, 2) == [(0, "1"), (1, "2")]


@pytest.mark.slow
def test_failures_and_hangs_are_shown(monkeypatch):
    with pytest.raises(AssertionError, match="the second rank says why"):
        launch(fail, 2)
    launch(seeds, 2)
    monkeypatch.setattr(launching, "TIMEOUT", 2)
    with pytest.raises(AssertionError, match="in hang"):
        launch(hang, 2)
