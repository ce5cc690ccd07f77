"""explain(): what training a model saves under stock Inductor and under lowmem, and what each pass did about it.

    report = graphopt.explain(model, *inputs)
    print(report)                      # by module, repeated blocks in one row
    report.to_html("report.html")      # every tensor, with the source line that made it
    report.plot()                      # bars before and after
    report.tensors()                   # every tensor, as dictionaries
    report.plan                        # what is kept, encoded and recomputed, and why
    report.frontier()                  # what every other number of bytes would cost; .plot()

Nothing of the model is executed, and nothing but torch is needed, except by plot().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch._inductor.config as inductor_config

from graphopt.errors import GraphoptError
from graphopt.options import Options, parse, with_preset
from graphopt.pipeline import PassRecord
from graphopt.plan import Plan
from graphopt.report.grouping import Pair, matched
from graphopt.tracer import Capture, SavedTensor, capture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Frontier", "Report", "explain"]


@dataclass(frozen=True)
class Frontier:
    """The best plans from most bytes to fewest, and the plan that applies, if there is one."""

    plans: tuple[Plan, ...]
    chosen: Plan | None = None

    def __str__(self) -> str:
        from graphopt.report.plan import frontier_text

        return frontier_text(self.plans)

    def plot(self) -> Figure:
        """A matplotlib figure: bytes against time and against error. ImportError if it is missing."""
        from graphopt.report.plan import frontier_plot

        return frontier_plot(self.plans, self.chosen)


@dataclass(frozen=True)
class Report:
    """The tensors saved for backward `before` (stock Inductor) and `now` (lowmem), and the passes between them.

    Tensors have other names in the two: one is kept if both save one of its module, operator, shape and dtype, gone if
    only stock saves it, new if only lowmem does. Bytes are those of whole storages.
    """

    before: tuple[SavedTensor, ...]
    now: tuple[SavedTensor, ...]
    records: tuple[PassRecord, ...]
    options: Options
    plan: Plan | None = None
    capture: Capture | None = field(default=None, repr=False, compare=False)
    inductor_options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def frontier(self) -> Frontier:
        """The whole curve of plans: bytes against estimated time and error. It takes a cut for each of its points."""
        if self.capture is None:
            raise GraphoptError("this report was not made by graphopt.explain: there is no graph to make plans for")
        with inductor_config.patch(dict(self.inductor_options)):
            return Frontier(tuple(self.capture.frontier(self.options)), self.plan)

    @property
    def bytes_before(self) -> int:
        return sum(tensor.bytes for tensor in self.before)

    @property
    def bytes_now(self) -> int:
        return sum(tensor.bytes for tensor in self.now)

    @property
    def fraction(self) -> float:
        """Bytes saved now, of those saved before; 1 where stock saves nothing either."""
        if self.bytes_before:
            return self.bytes_now / self.bytes_before
        return float("inf") if self.bytes_now else 1.0

    @property
    def pairs(self) -> list[Pair]:
        """Every tensor in the order of the model: (before, now) if kept, (before, None) if gone, (None, now) if new."""
        return matched(self.before, self.now)

    def tensors(self) -> list[dict[str, Any]]:
        """Every tensor in the order of the model, each with its state: "kept", "gone" or "new"."""
        return [pair.as_dict() for pair in self.pairs]

    def __repr__(self) -> str:
        return f"Report({self.bytes_before:,} bytes saved before, {self.bytes_now:,} now)"

    def __str__(self) -> str:
        from graphopt.report.text import text

        return text(self)

    def _repr_html_(self) -> str:
        from graphopt.report.html import fragment

        return fragment(self)

    def to_html(self, path: str | Path) -> None:
        """Write a page that needs no other file and no network."""
        from graphopt.report.html import page

        Path(path).write_text(page(self), encoding="utf-8")

    def plot(self) -> Figure:
        """A matplotlib figure: bars of before and now for the modules that save most. ImportError if it is missing."""
        from graphopt.report.plot import plot

        return plot(self)


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Trace one training step of `model(*inputs, **kwargs)`, without running it, and report what it saves.

    `options` are those of torch.compile, `preset` one of them; without any, those of the environment are taken. Under
    FakeTensorMode any size of model will do. Raises OptionsError, and CaptureError as `capture` does.
    """
    own, patches = parse(with_preset(preset, options))
    with inductor_config.patch(patches):
        captured = capture(model, *inputs, **kwargs)
        before = captured.saved
        now, records, planning = captured.lowmem(own)
    return Report(before, now, records, own, planning.plan if planning else None, captured, patches)
