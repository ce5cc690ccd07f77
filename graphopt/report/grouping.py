"""What a person would put in one row: tensors matched before and now, and repeated blocks under one name."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from graphopt.pipeline import Event
from graphopt.tracer import SavedTensor

if TYPE_CHECKING:
    from graphopt.report import Report

OUTSIDE = "(outside modules)"
# a fact is a module and something that holds of it; blocks that share most of their facts go by one name
Fact = tuple[str, object]


class Pair(NamedTuple):
    """One tensor as stock Inductor and as lowmem saves it; None on the side that does not."""

    before: SavedTensor | None
    now: SavedTensor | None

    @property
    def either(self) -> SavedTensor:
        found = self.now or self.before
        assert found is not None
        return found

    @property
    def state(self) -> str:
        return "new" if self.before is None else "gone" if self.now is None else "kept"

    @property
    def bytes_before(self) -> int:
        return self.before.bytes if self.before else 0

    @property
    def bytes_now(self) -> int:
        return self.now.bytes if self.now else 0

    def as_dict(self) -> dict[str, Any]:
        tensor = self.either
        return {
            "state": self.state, "module": tensor.module, "operator": tensor.operator,
            "dtype": str(tensor.dtype).removeprefix("torch."), "shape": tensor.shape,
            "bytes_before": self.bytes_before, "bytes_now": self.bytes_now,
            "readers": tensor.readers, "source": tensor.source,
        }  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Tensors alike: one operator, dtype and shape, made by one module or by that of each repeated block."""

    operator: str
    dtype: str
    shape: tuple[int, ...]
    readers: tuple[str, ...]
    pairs: tuple[Pair, ...]

    @property
    def counts(self) -> tuple[int, int]:
        states = Counter(pair.state for pair in self.pairs)
        return states["gone"] + states["kept"], states["new"] + states["kept"]

    @property
    def sizes(self) -> tuple[int, int]:
        return sum(pair.bytes_before for pair in self.pairs), sum(pair.bytes_now for pair in self.pairs)


@dataclass(frozen=True)
class Group:
    """The tensors one module makes, or that module of each repeated block."""

    module: str
    rows: tuple[Row, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        return sum(row.sizes[0] for row in self.rows), sum(row.sizes[1] for row in self.rows)


def matched(before: Sequence[SavedTensor], now: Sequence[SavedTensor]) -> list[Pair]:
    """Pair the tensors that both save; the order is that of `now`, what is gone goes ahead of the next one kept."""
    waiting: dict[object, deque[SavedTensor]] = defaultdict(deque)
    for tensor in before:
        waiting[(tensor.module, _kind(tensor))].append(tensor)
    pairs: list[Pair] = []
    for tensor in now:
        queue = waiting[(tensor.module, _kind(tensor))]
        pairs.append(Pair(queue.popleft() if queue else None, tensor))
    place = {pair.before.name: index for index, pair in enumerate(pairs) if pair.before}
    gone: dict[int, list[Pair]] = defaultdict(list)
    index = len(pairs)
    for tensor in reversed(before):
        if tensor.name in place:
            index = place[tensor.name]
        else:
            gone[index].insert(0, Pair(tensor, None))
    return [each for index, pair in enumerate(pairs) for each in (*gone[index], pair)] + gone[len(pairs)]


def grouped(report: Report) -> list[Group]:
    """The tensors of a report by module and kind: repeated blocks together, a module beside its relatives."""
    names = block_names(report)
    modules: dict[str, dict[tuple[str, str, tuple[int, ...]], list[Pair]]] = defaultdict(lambda: defaultdict(list))
    for pair in report.pairs:
        modules[names[pair.either.module]][_kind(pair.either)].append(pair)
    groups = []
    for module in _by_parent(modules):
        rows = []
        for kind, pairs in modules[module].items():
            readers = dict.fromkeys(names[reader] for pair in pairs for each in pair if each for reader in each.readers)
            rows.append(Row(*kind, tuple(_seen_from(module, reader) for reader in readers), tuple(pairs)))
        groups.append(Group(module, tuple(rows)))
    return groups


def events_by_text(events: Iterable[Event], names: Mapping[str, str]) -> dict[str, Counter[str]]:
    """What passes said, and how often for which module; what was said most comes first."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for event in events:
        found[event.text][names[event.module]] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1].total()))


def block_names(report: Report) -> dict[str, str]:
    """A name for every module path of a report: layers.0.mlp and layers.1.mlp become layers.*.mlp if they are alike."""
    facts: list[Fact] = []
    for tensor in (*report.before, *report.now):
        facts.append((tensor.module, _kind(tensor)))
        facts.extend((reader, ("reads", *_kind(tensor))) for reader in tensor.readers)
    for record in report.records:
        facts.extend((event.module, (record.name, event.text)) for event in (*record.fired, *record.left_alone))
    return name_blocks(facts)


def name_blocks(facts: Iterable[Fact]) -> dict[str, str]:
    """Replace the number of repeated blocks: by * for all of its siblings, by a range such as 1-31 for some of them."""
    facts = list(facts)
    paths = {module: module.split(".") for module, _ in facts}
    named: dict[str, list[str]] = {module: [] for module in paths}
    for depth in range(max(map(len, paths.values()), default=0)):
        # parent, as named so far -> number -> what holds below it
        siblings: dict[tuple[str, ...], dict[int, set[object]]] = defaultdict(lambda: defaultdict(set))
        for module, fact in facts:
            path = paths[module]
            if len(path) > depth and path[depth].isdigit():
                below = tuple("*" if part.isdigit() else part for part in path[depth + 1 :])
                siblings[tuple(named[module])][int(path[depth])].add((below, fact))
        labels = {parent: _alike(numbers) for parent, numbers in siblings.items()}
        for module, path in paths.items():
            if len(path) > depth:
                label = labels[tuple(named[module])][int(path[depth])] if path[depth].isdigit() else path[depth]
                named[module].append(label)
    return {module: ".".join(path) or OUTSIDE for module, path in named.items()}


def _alike(numbers: dict[int, set[object]]) -> dict[int, str]:
    """Labels for numbered siblings, those with at least half of their facts in common under one."""
    classes: list[list[int]] = []
    for number in sorted(numbers):
        for each in classes:
            first, facts = numbers[each[0]], numbers[number]
            if 2 * len(first & facts) >= min(len(first), len(facts)):
                each.append(number)
                break
        else:
            classes.append([number])
    return {number: "*" if len(each) == len(numbers) > 1 else _ranges(each) for each in classes for number in each}


def _ranges(numbers: list[int]) -> str:
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _by_parent(modules: Iterable[str]) -> list[str]:
    """The modules in their order, but one that comes late goes behind those it shares the longest path with."""
    found: list[str] = []
    for module in modules:
        shared = [_shared(module, other) for other in found]
        last = max(range(len(found)), key=lambda i: (shared[i], i), default=-1)
        found.insert(last + 1 if last >= 0 and shared[last] else len(found), module)
    return found


def _shared(module: str, other: str) -> int:
    """How many parts of two module paths are the same from the start."""
    parts = module.split("."), other.split(".")
    return next((i for i, (a, b) in enumerate(zip(*parts)) if a != b), min(map(len, parts)))


def _kind(tensor: SavedTensor) -> tuple[str, str, tuple[int, ...]]:
    return tensor.operator, str(tensor.dtype).removeprefix("torch."), tensor.shape


def _seen_from(module: str, reader: str) -> str:
    """A reader's name without what it shares with the module that made the tensor."""
    if reader == module:
        return "itself"
    parts = reader.split(".")
    start = min(_shared(module, reader), len(parts) - 1)
    while start and not parts[start].isidentifier():  # a block goes by its list and number
        start -= 1
    return ".".join(parts[start:])
