"""Inductor's CUDA code of one training graph, made on a machine without a GPU.

    forward, backward = generate(module, [x], backend="lowmem", options={"preset": "exact"})
    forward.bytes, [kernel.name for kernel in forward.kernels], forward.source

The graph is traced and cut on the CPU; both halves are then moved to a fake cuda:0, an H100, and Inductor writes their
code. Nothing is built, run or allocated. What torch decides by the device before the joint graph exists is decided as
for a CPU: attention has another layout there. Needs triton, and of torch 2.13 the internals that `_stand_ins`, `_move`
and `generate` name; it works under TRITON_INTERPRET too. It may leave Inductor's caches believing in the device, so a
process that also compiles for real gives it one of its own.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.scheduler as scheduler
import triton
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._prims import TensorMeta
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget

import graphopt.backend
from graphopt.graph import fake_mode
from graphopt.tracer import forward_graph

DEVICE = torch.device("cuda:0")
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    L2_cache_size=50 << 20, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    gcnArchName="",
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch of a Triton kernel: how many loads and stores its text has of each buffer it is given."""

    name: str
    loads: Mapping[str, int]
    stores: Mapping[str, int]


@dataclass(frozen=True)
class Generated:
    """Inductor's code of one half of a training graph.

    `bytes` is what Inductor's scheduler counts: of each kernel the buffers it reads and writes, matrix products and
    other calls included. A buffer that a kernel reads twice counts once, a workspace does not count.
    """

    is_backward: bool
    source: str = field(repr=False)
    bytes: int

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """The launches of Triton kernels, in their order."""
        texts = dict(re.findall(r"^def (triton_\w+)(\(.*?)^''', device_str", self.source, re.MULTILINE | re.DOTALL))
        launches = re.findall(r"^ +(triton_\w+)\.run\((.*), stream=", self.source, re.MULTILINE)
        return tuple(_kernel(name, texts[name], arguments) for name, arguments in launches)

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtypes of the buffers that are allocated."""
        return dict(re.findall(r"(\w+) = empty_strided_cuda\(.*, torch\.(\w+)\)", self.source))

    @cached_property
    def products(self) -> tuple[str, ...]:
        """The buffers that matrix products write."""
        return tuple(re.findall(r"extern_kernels\.(?:addmm|mm|bmm)\(.*out=(\w+)\)", self.source))

    @cached_property
    def read_by_products(self) -> tuple[frozenset[str], ...]:
        """Of each matrix product the buffers that it reads."""
        calls = re.findall(r"extern_kernels\.(?:addmm|mm|bmm)\((.*)out=\w+\)", self.source)
        return tuple(frozenset(re.findall(r"\bbuf\d+\b", call)) for call in calls)

    @cached_property
    def operators(self) -> tuple[str, ...]:
        """The operators of graphopt that are called as they stand."""
        return tuple(re.findall(r"torch\.ops\.graphopt\.(\w+)\.default\(", self.source))

    @cached_property
    def workspace_sums(self) -> int:
        """How many sums over a kernel's workspace are calls of their own."""
        return len(re.findall(r" = workspace_\d+\[.*\.sum\(", self.source))

    @cached_property
    def workspace_bytes(self) -> int:
        """What kernels leave in workspaces for these sums: traffic that `bytes` lacks, once out, once in."""
        found = re.findall(r"workspace_\d+ = empty_strided_cuda\(\((\d+), \), \(1, \), torch\.(\w+)\)", self.source)
        return sum(2 * int(size) * getattr(torch, dtype).itemsize for size, dtype in found)


def generate(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    backend: str = "inductor",
    options: Mapping[str, Any] | None = None,
) -> list[Generated]:
    """The code of the forward and the backward graph of `function(*inputs)` under stock Inductor or "lowmem".

    `function` forms one graph; its tensors are on the CPU, or fake ones made under FakeTensorMode, which take no
    memory. `options` are those of the backend. Without anything that needs a gradient there is one graph.
    """
    found: list[Generated] = []

    def keep(lowering: GraphLowering, *_: Any) -> Any:
        source = lowering.codegen()[0].value
        found.append(Generated(lowering.is_backward, source, lowering.count_bytes()[0]))
        return SimpleNamespace(call=lambda inputs: [], key="", __file__="")  # nothing calls it

    def compile_half(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        with _stand_ins(), mock.patch.object(GraphLowering, "compile_to_module", keep):
            compile_fx_inner(gm, _move(gm, example_inputs), **kwargs)
        return make_boxed_func(gm.forward)  # nothing calls it

    # with more threads other processes would build the kernels meanwhile
    settings = {"fx_graph_cache": False, "compile_threads": 1, **(options or {})}
    torch._dynamo.reset()
    gm, example_inputs = forward_graph(function, tuple(inputs), {})
    both_now = functorch_config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True)
    with torch.enable_grad(), unset_fake_temporarily(), both_now:
        if backend == "inductor":
            compile_fx(gm, example_inputs, compile_half, settings)
        else:
            with mock.patch.object(graphopt.backend, "compile_fx_inner", compile_half):
                graphopt.backend.lowmem(gm, example_inputs, options=settings)
    return found


def _kernel(name: str, text: str, arguments: str) -> Kernel:
    # a view counts as the buffer it is of
    given = re.sub(r"reinterpret_tensor\((\w+), \([^)]*\), \([^)]*\), \w+\)", r"\1", arguments).split(", ")
    parameters = re.findall(r"\w+", text.partition("):")[0].replace(": tl.constexpr", ""))
    buffers = dict(zip(parameters, given))

    def count(call: str) -> Mapping[str, int]:
        return dict(Counter(buffers[pointer] for pointer in re.findall(rf"tl\.{call}\((\w+)", text)))

    return Kernel(name, count("load"), count("store"))


def _move(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """Move a graph with all its values to the device, in place; the answer are the inputs there."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == "cpu":
            return DEVICE
        if isinstance(value, Tensor) and value.device.type == "cpu":
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=DEVICE)
        return value

    for node in gm.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    gm.recompile()
    mode = fake_mode(gm.graph)
    with mode:
        inputs = [moved(value) for value in example_inputs]
    FakeTensorProp(gm, mode=mode).propagate_dont_convert_inputs(*inputs)
    return inputs


class _Driver:
    """What Inductor asks Triton's driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, PROPERTIES.warp_size)


def _lookup_seed(seeds: Tensor, index: int) -> Any:
    return TensorMeta(shape=(), strides=(), dtype=torch.int64, device=seeds.device)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Let Inductor find the device, by every name under which it asks for one."""

    names: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_properties", lambda device=None: PROPERTIES),
        (CudaInterface, "get_device_properties", staticmethod(lambda device=None: PROPERTIES)),
        (CudaInterface, "is_bf16_supported", staticmethod(lambda including_emulation=False: True)),
        (scheduler, "has_triton", lambda: True),
        (triton.runtime.driver, "_active", _Driver()),
        # its own answer looks into a tensor, which takes a build with CUDA even if the tensor is fake
        (torch.ops.prims.inductor_lookup_seed.default, "prim_meta_impl", _lookup_seed),
        # so does a copy into a slice, which Inductor makes for its shape alone
        (FakeTensor, "copy_", lambda self, source, non_blocking=False: self),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in names:
            stack.enter_context(mock.patch.object(owner, name, value))
        DeviceProperties.create.cache_clear()
        stack.callback(DeviceProperties.create.cache_clear)
        yield
