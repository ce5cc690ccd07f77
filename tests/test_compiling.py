"""Settings while a graph is compiled: the last thread puts them back, what somebody else sets stays."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache, PyCodeCache
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.utils import run_and_get_code

from graphopt.compiling import attribute, no_empty_tails


def test_the_last_thread_to_leave_puts_a_setting_back():
    owner, inside, go_on = SimpleNamespace(value=1), threading.Barrier(2), threading.Event()
    setting = attribute(owner, "value", lambda before: before + 1)

    def other():
        with setting:
            inside.wait()
            go_on.wait()

    thread = threading.Thread(target=other)
    with setting:
        thread.start()
        inside.wait()
    assert owner.value == 2
    go_on.set()
    thread.join()
    assert owner.value == 1


def test_what_is_set_meanwhile_stays_and_an_error_passes():
    owner = SimpleNamespace(value=1)
    setting = attribute(owner, "value", lambda before: before + 1)
    with setting:
        owner.value = 7
    assert owner.value == 7
    with pytest.raises(KeyError), setting, setting:
        assert owner.value == 8
        raise KeyError
    assert owner.value == 7


def test_a_patch_that_overlaps_leaves_nothing_for_good():
    owner = SimpleNamespace(value=1)
    setting = attribute(owner, "value", lambda before: before + 1)
    with setting:
        theirs, owner.value = owner.value, 9
    owner.value = theirs
    with setting:
        assert owner.value == 2
    assert owner.value == 1


@pytest.mark.slow
def test_kernels_are_compiled_while_others_are_generated(monkeypatch):
    events = []

    def recording(owner, name, event):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            events.append(event(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr("graphopt.compiling.get_compile_threads", lambda: 2)
    recording(CppPythonBindingsCodeCache, "load_pybinding_async", lambda types, source: (tuple(types), source))
    recording(PyCodeCache, "load_by_key_path", lambda *_: "module")
    define = PythonWrapperCodegen.define_kernel
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    compiled = torch.compile(model, backend="lowmem")(torch.randn(64, 32))
    assert PythonWrapperCodegen.define_kernel is define
    module = events.index("module")
    ahead, asked = events[:module], events[module + 1 :]
    assert set(ahead) == set(asked) and len(asked) > 1  # backward's module is made later, by backward()
    assert compiled.shape == (64, 32)


def rows(width):
    norm, x = nn.LayerNorm(width), torch.randn(4, 6, width)

    def function(x):
        y = norm(x).softmax(-1)
        return y.transpose(0, 2).contiguous(), y.sum(0), y.to(torch.bfloat16), x.amax(1)

    return function, (x,)


def tiles(outer, inner):
    x, y = torch.randn(4, outer, inner), torch.randn(4, inner, outer)

    def function(x, y):
        return (x * y.transpose(1, 2)).sum((0, 2))  # which is stored as the kernel of both tails would

    return function, (x, y)


# and whether some of its loops are empty
CASES = {
    "rows": (rows(64), True), "rows, tail": (rows(65), False), "rows, tail alone": (rows(5), False),
    "tiles": (tiles(64, 64), True), "tiles, outer tail": (tiles(65, 64), True),
    "tiles, outer tail alone": (tiles(8, 64), True), "tiles, inner tail": (tiles(64, 65), True),
    "tiles, tails alone": (tiles(8, 5), False),
}  # fmt: skip


@pytest.mark.parametrize("case, some_are_empty", CASES.values(), ids=CASES)
def test_without_empty_tails_the_generated_code_is_the_same(case, some_are_empty, monkeypatch):
    function, inputs = case
    generated = []
    codegen = SchedulerNode.codegen
    monkeypatch.setattr(SchedulerNode, "codegen", lambda *args: generated.append(args) or codegen(*args))
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)

    def code(setting):
        generated.clear()
        torch._dynamo.reset()
        with inductor.patch(force_disable_caches=True), torch.no_grad(), setting:
            _, (found,) = run_and_get_code(torch.compile(function), *inputs)
        return [line for line in found.splitlines() if not line.startswith("#")], len(generated)

    stock, bodies = code(contextlib.nullcontext())
    found, fewer = code(no_empty_tails)
    assert found == stock
    assert (fewer < bodies) == some_are_empty


def dropouts(x):
    for _ in range(3):
        x = nn.functional.dropout(x, 0.3) @ x.T
    several = nn.functional.dropout(x, 0.3) + torch.rand_like(x)
    return several, nn.functional.dropout(x.T, 0.2).sum(0), torch.randint(9, (7,)), torch.randn(())


@pytest.mark.slow
@pytest.mark.parametrize("size, dynamic", [(37, False), (37, True), (2, False)])
def test_kernels_that_read_other_seeds_are_one_and_draw_what_stock_draws(size, dynamic):
    x = torch.randn(size, size)

    def run(backend):
        torch._dynamo.reset()
        with inductor.patch(force_disable_caches=True):
            torch.manual_seed(0)
            found, (code,) = run_and_get_code(torch.compile(dropouts, backend=backend, dynamic=dynamic), x)
        return found, code.count("cpp_pybinding(")

    drawn, kernels = run("inductor")
    found, fewer = run("lowmem")
    assert all(torch.equal(*both) for both in zip(found, drawn, strict=True))
    assert fewer == kernels - 2  # of three dropouts
