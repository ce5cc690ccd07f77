"""Long training, changing shapes, deep models: no growth, no more compiles than stock's, seconds to capture."""

import ctypes
import gc
import sys
import time

import psutil
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt

STEPS, WARM = 1000, 200
BACKENDS = ["lowmem_eager", pytest.param("lowmem", marks=pytest.mark.slow)]


def network():
    return nn.Sequential(
        nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.RMSNorm(64)
    )


def _resident():
    """Bytes of the process in memory, without what its allocator holds free in the pieces that other tests left."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["compressed", "smallest"])
def test_a_thousand_steps_do_not_grow(backend, preset):
    model = network()
    compiled = torch.compile(model, backend=backend, options={"preset": preset, "time_slack": 10.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(256, 64)
    tensors, resident = [], []
    for step in range(STEPS):
        F.mse_loss(compiled(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (WARM, STEPS - 1):
            gc.collect()
            tensors.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
            resident.append(_resident())
    assert tensors[1] <= tensors[0]
    # one activation of 64 KiB that stayed at each step would be 51 MB, its codes 13 MB
    assert resident[1] - resident[0] < 8e6


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_changing_shapes_compile_as_often_as_under_stock(dynamic):
    def compiles(backend):
        torch._dynamo.reset()
        seen = []

        def counting(gm, example_inputs):
            seen.append(gm)
            return torch._dynamo.lookup_backend(backend)(gm, example_inputs)

        compiled = torch.compile(network(), backend=counting, dynamic=dynamic)
        for rows in (16, 32, 32, 7, 100, 64, 16, 33):
            compiled(torch.randn(rows, 64)).sum().backward()
        return len(seen)

    assert compiles("lowmem_eager") == compiles("aot_eager_decomp_partition")


def test_a_deep_llama_is_captured_in_a_minute():
    """32 layers of the 7-billion model, in FakeTensorMode."""
    with FakeTensorMode():
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, use_cache=False))
        tokens = torch.zeros(1, 2048, dtype=torch.long)
        start = time.process_time()
        captured = graphopt.capture(model, tokens, labels=tokens)
        assert time.process_time() - start < 60
    assert len(captured.joint.graph.nodes) > 32 * 50
