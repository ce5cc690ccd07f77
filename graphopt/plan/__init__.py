"""The plan: for every saved tensor, whether it is kept as it is, encoded or recomputed, and what that costs.

    report = graphopt.explain(model, *inputs, options={"memory_budget": 0.25})
    print(report.plan)                        # every choice, with its reason
    report.plan.save("plan.json")             # data: Plan.load, plan.diff(other)
    torch.compile(model, backend="lowmem", options={"plan": "plan.json"})

candidates.py    what can be done with each value of a joint graph
ranges.py        which values one scale cannot serve
softmax.py       what softmaxes ask of codecs
estimate.py      what that costs in time
solve.py         the cheapest way to do it at a price of a byte: a minimum cut
choose.py        the price at which a goal is met
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import fx

from graphopt.errors import OptionsError, PlanError
from graphopt.graph import tensor

KEEP, RECOMPUTE = "keep", "recompute"
VERSION = 1


@dataclass(frozen=True)
class Choice:
    """What becomes of one value that backward reads, or is computed from.

    `decision` is "keep", "recompute" or the name of a codec. `bytes` and `bytes_now` are those of its storage before
    and after; `time` is a fraction of a step; `error` the share of the gradient's relative error, both estimated.
    """

    node: str
    operator: str
    module: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    decision: str
    bytes: int
    bytes_now: int
    time: float
    error: float
    why: str


@dataclass(frozen=True)
class Plan:
    """The choices for one joint graph, which `graph` identifies, and what they add up to.

    `bytes` is what is saved in all, `stock` what stock Inductor saves; `time` is the estimated time that a step takes
    longer, as a fraction of it, `error` the estimated relative error of the gradient.
    """

    graph: str
    goal: str
    choices: tuple[Choice, ...]
    bytes: int
    stock: int
    time: float
    error: float

    def __str__(self) -> str:
        from graphopt.report.plan import text

        return text(self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, for the option "plan"."""
        Path(path).write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote. Raises PlanError, naming what is wrong with the file."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"plan {str(path)!r} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise PlanError(f"plan {str(path)!r} is not JSON: {error}") from None
        return cls.parse(found, str(path))

    @classmethod
    def parse(cls, found: Any, name: str = "plan") -> Plan:
        """A plan from what JSON makes of it; `name` is what errors call it."""
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise PlanError(f"{name!r} is not a plan of version {VERSION}")
        given = {key: value for key, value in found.items() if key != "version"}
        choices = given.get("choices")
        if not isinstance(choices, (list, tuple)):  # the second by dataclasses.asdict
            raise PlanError(f"{name!r} has no list of choices")
        rows = tuple(_choice(row, f"{name!r}, choice {number}") for number, row in enumerate(choices))
        plan = _checked(cls, {**given, "choices": rows}, repr(name))
        return plan  # type: ignore[no-any-return]

    def is_for(self, graph: fx.Graph) -> bool:
        """Whether this is the joint graph, spelt out, that the plan was made for."""
        return self.graph == fingerprint(graph)

    def diff(self, other: Plan) -> tuple[tuple[Choice | None, Choice | None], ...]:
        """The choices in which two plans differ, each as (here, there); None where one has no such value."""
        here = {each.node: each for each in self.choices}
        there = {each.node: each for each in other.choices}
        pairs = [(here.get(node), there.get(node)) for node in dict.fromkeys([*here, *there])]
        return tuple((a, b) for a, b in pairs if (a and a.decision) != (b and b.decision))


def _choice(row: Any, where: str) -> Choice:
    from graphopt.codecs import named

    if not isinstance(row, dict):
        raise PlanError(f"{where}: not an object")
    shape = row.get("shape")
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) for size in shape):
        raise PlanError(f"{where}: 'shape' is not a list of numbers")
    choice: Choice = _checked(Choice, {**row, "shape": tuple(shape)}, where)
    if choice.decision not in (KEEP, RECOMPUTE):
        try:
            named(choice.decision)
        except OptionsError as error:
            raise PlanError(
                f"{where}: decision {choice.decision!r} is not keep, recompute or a codec: {error}"
            ) from None
    return choice


_TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float)}


def _checked(kind: Any, given: dict[str, Any], where: str) -> Any:
    """`kind` of what is given, which must have its fields and no others, of their types."""
    names = [field.name for field in fields(kind)]
    for name in names:
        if name not in given:
            raise PlanError(f"{where}: {name!r} is missing")
    for name in given:
        if name not in names:
            raise PlanError(f"{where}: {name!r} is not known")
    for field in fields(kind):
        expected, value = _TYPES.get(str(field.type)), given[field.name]
        if expected and (isinstance(value, bool) or not isinstance(value, expected)):
            raise PlanError(f"{where}: {field.name!r} is {value!r}, not of type {field.type}")
    return kind(**given)


def fingerprint(graph: fx.Graph) -> str:
    """What identifies a joint graph: its operators, their shapes and dtypes and how they hang together."""
    digest = hashlib.sha256()
    for line in _lines(graph):
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def _lines(graph: fx.Graph) -> Iterable[str]:
    for node in graph.nodes:
        value = tensor(node)
        about = "" if value is None else f"{tuple(map(str, value.shape))} {value.dtype} {value.device.type}"
        yield f"{node.name} {node.target} {[each.name for each in node.all_input_nodes]} {about}\n"
