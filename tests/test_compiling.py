"""Settings while a graph is compiled: the last thread puts them back, what somebody else sets stays."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._inductor.codecache import CppPythonBindingsCodeCache, PyCodeCache
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from graphopt.compiling import attribute


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
