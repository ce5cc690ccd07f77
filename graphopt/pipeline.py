"""The runner: passes in their order, each timed, linted and recorded; a failing one is named.

A pass is a function (gm, example_inputs) -> gm. What it did it says through `fired`, what it met and could not
rewrite through `left_alone`; both are kept in the record of the run and read by `graphopt.explain`.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial, update_wrapper
from typing import Any

from torch import fx

from graphopt.errors import GraphoptError, PassError
from graphopt.graph import module_of, read_by_backward, source_of, storage_bytes, tensor

Pass = Callable[[fx.GraphModule, Sequence[object]], fx.GraphModule]


@dataclass(frozen=True)
class Event:
    """One place where a pass fired or held back."""

    node: str
    module: str
    source: str
    text: str


@dataclass
class PassRecord:
    """What one run of one pass did. Bytes are those of the forward tensors backward reads, before the cut."""

    name: str
    seconds: float = 0.0
    fired: list[Event] = field(default_factory=list)
    left_alone: list[Event] = field(default_factory=list)
    nodes_added: int = 0
    nodes_removed: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


_record: ContextVar[PassRecord | None] = ContextVar("graphopt_record", default=None)


def bind(each: Callable[..., fx.GraphModule], **keywords: Any) -> Pass:
    """A pass with its keywords set, under its own name."""
    return update_wrapper(partial(each, **keywords), each)


def fired(node: fx.Node, text: str) -> None:
    """Record that the running pass rewrote `node`; nothing happens outside a run."""
    if (record := _record.get()) is not None:
        record.fired.append(Event(node.name, module_of(node), source_of(node), text))


def left_alone(node: fx.Node, text: str) -> None:
    """Record that the running pass met `node`, did not rewrite it, and why."""
    if (record := _record.get()) is not None:
        record.left_alone.append(Event(node.name, module_of(node), source_of(node), text))


def take_back(records: Iterable[PassRecord], why: str) -> None:
    """Record that what fired was undone, and why."""
    for record in records:
        record.left_alone += [replace(event, text=why) for event in record.fired]
        record.fired.clear()


@contextlib.contextmanager
def blamed(name: str, gm: fx.GraphModule) -> Iterator[None]:
    """Turn what is raised inside, errors of graphopt's own left out, into a PassError of the pass `name`."""
    try:
        yield
    except GraphoptError:
        raise
    except Exception as error:
        raise PassError(_blame(name, error, gm)) from error


def run(
    gm: fx.GraphModule, example_inputs: Sequence[object], passes: Sequence[Pass], disable: Iterable[str] = ()
) -> tuple[fx.GraphModule, list[PassRecord]]:
    """Run `passes` in order over one graph, those named in `disable` left out.

    Raises PassError, naming the pass, when a pass raises or leaves a graph that fails lint.
    """
    records = []
    off = set(disable)
    for each in passes:
        name = getattr(each, "__name__", type(each).__name__)
        if name in off:
            continue
        record = PassRecord(name, bytes_before=_bytes_read(gm))
        before = {node.name for node in gm.graph.nodes}
        token = _record.set(record)
        start = time.perf_counter()
        try:
            with blamed(name, gm):
                gm = each(gm, example_inputs)
                gm.graph.lint()
        finally:
            _record.reset(token)
        record.seconds = time.perf_counter() - start
        after = {node.name for node in gm.graph.nodes}
        record.nodes_added, record.nodes_removed = len(after - before), len(before - after)
        record.bytes_after = _bytes_read(gm)
        records.append(record)
    return gm, records


def _bytes_read(gm: fx.GraphModule) -> int:
    return storage_bytes(value for node in read_by_backward(gm.graph) if (value := tensor(node)) is not None)


def _blame(name: str, error: Exception, gm: fx.GraphModule) -> str:
    from graphopt.passes import NAMES

    # the node the pass was at: the last fx.Node among the locals of the frames the error came through
    node, trace = None, error.__traceback__
    while trace is not None:
        found = [value for value in trace.tb_frame.f_locals.values() if isinstance(value, fx.Node)]
        node, trace = (found[-1] if found else node), trace.tb_next
    where = f" at node {node.name} ({node.target})" if node is not None else ""
    line = f", made by {source_of(node)}" if node is not None and source_of(node) else ""
    option = "encode" if name == "plan" else name  # without that pass nothing is planned
    around = f"; the option 'disable' of {option!r} leaves it out" if option in NAMES else ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"pass {name!r} failed{where}{line}: {type(error).__name__}: {error}\n"
        f"  raised at {last.filename}:{last.lineno}, in {last.name}\n"
        f"This is a bug in the pass, not in the model{around}."
    )
