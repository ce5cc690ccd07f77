"""What makes compiling quicker: settings of the whole process that hold while a graph is compiled.

    quick_flow              cuts look for a maximum flow by a quicker algorithm
    young_garbage_only      no full run of the garbage collector
    kernels_ahead           the C++ compiler starts on each kernel while Inductor generates the next
    no_empty_tails          no C++ is generated of what vectors leave over where they leave nothing
    seeds_by_argument       C++ kernels that differ in nothing but which seeds they read are one
    quick_links             the linker does not read libtorch for each of them

Each is a context manager and a decorator. Several threads may be inside one; the last to leave it puts things back.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sympy
from networkx.algorithms.flow import boykov_kolmogorov, maxflow
from torch._inductor import cpp_builder
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.codegen.cpp import CppKernel, CppKernelProxy, CppTile2DKernel, CppVecKernel
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.loop_body import LoopBody
from torch._inductor.ops_handler import WrapperHandler
from torch._inductor.virtualized import V

from graphopt.linking import quickly

NEVER = 2**31 - 1  # collections of the middle generation before a full one
CPP = "async_compile.cpp_pybinding("


class Setting(contextlib.ContextDecorator):
    """A setting, other while any thread is inside. What somebody else sets meanwhile stays."""

    def __init__(self, get: Callable[[], Any], set: Callable[[Any], None], change: Callable[[Any], Any]) -> None:
        self.get, self.set, self.change = get, set, change
        self.lock, self.inside = threading.Lock(), 0
        self.before: Any = None
        self.own: Any = None

    def __enter__(self) -> None:
        with self.lock:
            now = self.get()
            if not self.inside and now != self.own:  # else somebody who had set it meanwhile has put ours back
                self.before, self.own = now, self.change(now)
                self.set(self.own)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside and self.get() == self.own:
                self.set(self.before)


def attribute(owner: Any, name: str, change: Callable[[Any], Any]) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value), change)


def _ahead(define: Callable[..., None]) -> Callable[..., None]:
    """Let Inductor's wrapper, where it is told of a kernel, compile it as the generated module will ask for later.

    That finds it by its source in the process's cache. What fails here fails there again, and is raised there.
    """

    def define_kernel(self: Any, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> None:
        define(self, kernel_name, kernel_body, *args, **kwargs)
        if kernel_body.startswith(CPP) and get_compile_threads() > 1:
            with contextlib.suppress(Exception):
                call: Any = ast.parse(kernel_body.strip(), mode="eval").body
                types, source = map(ast.literal_eval, call.args)
                CppPythonBindingsCodeCache.load_pybinding_async(types, source, submit_fn=AsyncCompile.submit)

    return define_kernel


def _each_body(change: Callable[..., Callable[..., Any]], codegen: Callable[..., None]) -> Callable[..., None]:
    """Let Inductor's C++ kernels be generated of loop bodies that are changed."""

    def changed(fn: Any) -> Any:
        if isinstance(fn, LoopBody):
            return fn
        body = change(fn)
        body.original_fn = getattr(fn, "original_fn", fn)  # type: ignore[attr-defined]  # which Inductor looks into
        return body

    def codegen_functions(self: Any, fn_list: Sequence[Any], var_sizes_list: Any) -> None:
        codegen(self, [changed(fn) for fn in fn_list], var_sizes_list)

    return codegen_functions


def _unless_empty(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Nothing of the loop behind the last whole vector where it has no iterations.

    The condition that it would stand under being false, what is generated of it is thrown away in any case.
    """
    return lambda *index_vars: None if _empty(V.kernel) else fn(*index_vars)


def _empty(kernel: Any) -> bool:
    if isinstance(kernel, CppTile2DKernel):
        # what comes behind a reduction is taken from the kernel of both tails wherever the outer one is not empty
        outer, inner = kernel.outer_tail_size, kernel.inner_tail_size
        return bool(outer == 0 or (outer is None and inner == 0))
    return isinstance(kernel, CppVecKernel) and bool(kernel.tail_size == 0)


def _told_of_seeds(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The place of each seed an argument of the kernel, as in Inductor's Triton code; stock's C++ has a number."""

    def body(*index_vars: Any) -> Any:
        if not isinstance(V.kernel, CppKernel):  # Inductor looks at what is read
            return fn(*index_vars)
        with V.set_ops_handler(_SeedsByArgument(V.ops)):
            return fn(*index_vars)

    return body


class _SeedsByArgument(WrapperHandler):
    def load_seed(self, name: str, offset: int) -> Any:
        place = sympy.Symbol(V.kernel.args.seed_offset("load_seed_offset", offset), integer=True, nonnegative=True)
        return self._inner.load(name, place)


# Up to seven times as fast as the default of networkx on the graph of a GPT-2 of twelve layers. The cut is the same:
# capacities are whole numbers, and the nodes that still reach the sink are those of every maximum flow.
quick_flow = attribute(maxflow, "default_flow_func", lambda _: boykov_kolmogorov)

# Compiling makes so many objects, and keeps them until its end, that full runs, each of which walks all objects of the
# process, take a tenth of its time and find little.
young_garbage_only = Setting(
    gc.get_threshold, lambda thresholds: gc.set_threshold(*thresholds), lambda before: (*before[:2], NEVER)
)

# Stock Inductor hands the compiler all kernels of a graph once the last is generated, and other cores wait until then.
kernels_ahead = attribute(PythonWrapperCodegen, "define_kernel", _ahead)

# Stock generates each loop once without vectors, once with them, and once for what they leave over, nothing mostly.
no_empty_tails = attribute(CppKernelProxy, "codegen_functions", partial(_each_body, _unless_empty))

# Layers that are alike in all but their dropouts' seeds share their kernels, which are half of those of a GPT-2.
seeds_by_argument = attribute(CppKernelProxy, "codegen_functions", partial(_each_body, _told_of_seeds))

# More than a third of what a small kernel takes. Inductor's caches keep it under the command that stock would run.
quick_links = attribute(cpp_builder, "run_compile_cmd", quickly)
