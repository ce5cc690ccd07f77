"""Check: what check() found, and the verdict on it in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from graphopt.codecs import named
from graphopt.options import Options
from graphopt.plan import KEEP, RECOMPUTE

# Limits. eps is that of the least precise dtype among a model's parameters and saved tensors.
# the loss: eps twice, for the same roundings in another order; float32 sums thousands of terms
LOSS_ROUNDINGS, LOSS_FLOAT32 = 2, 1e-5
# a parameter's gradient: two steps of one precision are at the most so many times as far apart as stock is from
# float32; where that is not known, half of the digits agree, sqrt(eps). One below eps of the norm of all is rounding
ROUNDING = 3
# beside rounding, times the tolerance: a weight's gradient takes over the error of its input, and as much of what
# backward computes it through
CODECS = 2
# of codes of activations: 0.05 to 0.08 over all parameters of a block (benchmarks/results), and three times in one
CODES = 0.25
# of a budget, which has no tolerance: a step of cosine 0.9 still goes down nine tenths as fast
UNLIMITED = 0.45
# of a step's time: what others on the machine make of the median of a few pairs
NOISE = 0.25


@dataclass(frozen=True)
class Gradient:
    """One parameter's gradient under lowmem by stock's: |g - g0| / |g0|, which may reach `allowed`, and cosine."""

    parameter: str
    error: float
    cosine: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class Check:
    """One step under stock Inductor and under lowmem.

    `gradients` are those of all parameters that have one, the worst first; `error` and `cosine` are over all of them.
    `float32` is how far stock's and lowmem's gradients are from those of eager float32, None where random numbers or
    the model's size forbid it. Bytes are those saved for backward; `step_ratio` is lowmem's time by stock's, the median
    of pairs. `precision` is eps of the least precise dtype. `problems` say what is wrong and what to do.
    """

    options: Options
    stock_loss: float
    loss: float
    gradients: tuple[Gradient, ...]
    error: float
    cosine: float
    float32: tuple[float, float] | None
    stock_bytes: int
    bytes: int
    step_ratio: float
    precision: float

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(_problems(self))

    @property
    def verdict(self) -> str:
        """Whether lowmem does what it should here, in a few sentences."""
        if self.problems:
            return "\n".join(("Not as it should be:", *(f"- {each}" for each in self.problems)))
        saved = f"The same loss, and {1 - self.bytes / self.stock_bytes:.0%} fewer bytes saved."
        if self.float32 and self.float32[1] <= 1.25 * self.float32[0]:  # sqrt(3 / 2): a third rounding beside two
            stock, own = (f"{each:.2g}" for each in self.float32)
            return f"{saved} Gradients are as far from float32's as stock Inductor's are ({own} against {stock})."
        return f"{saved} Gradients differ from stock Inductor's by {self.error:.2g}, as they may with {self.options}."

    def __str__(self) -> str:
        rows = [
            ("", "stock", "lowmem"),
            ("loss", f"{self.stock_loss:.6g}", f"{self.loss:.6g}"),
            ("saved bytes", f"{self.stock_bytes:,}", f"{self.bytes:,}"),
            ("step time", "1", f"{self.step_ratio:.2f}"),
        ]
        if self.float32:
            rows.append(("gradients from float32's", f"{self.float32[0]:.2g}", f"{self.float32[1]:.2g}"))
        rows += [("", "", ""), ("gradients from stock's", "error", "cosine")]
        rows.append(("all parameters", f"{self.error:.2g}", f"{self.cosine:.6f}"))
        rows += [(each.parameter[-40:], f"{each.error:.2g}", f"{each.cosine:.6f}") for each in self.gradients[:5]]
        lines = [f"{a:42s}{b:>16s}{c:>16s}".rstrip() for a, b, c in rows]
        return "\n".join([f"graphopt.check, {self.options}", *lines, "", self.verdict])


def limit(options: Options) -> float:
    """The relative error that a parameter's gradient may have beside rounding."""
    tolerance = options.value("tolerance") if options.planned else 0.0
    if options.plan is not None:
        decisions = {each.decision for each in options.plan.choices} - {KEEP, RECOMPUTE}
        tolerance = max((named(decision).error for decision in decisions), default=0.0)
    return max(CODECS * tolerance if tolerance < math.inf else UNLIMITED, CODES if options.code else 0.0)


def _problems(found: Check) -> Iterator[str]:
    bug = "That is a bug; the option 'disable' finds the pass that has it."
    apart = abs(found.loss - found.stock_loss) / (abs(found.stock_loss) or 1.0)
    allowed = max(LOSS_ROUNDINGS * found.precision, LOSS_FLOAT32)
    if not apart <= allowed:
        yield (
            f"The loss is {found.loss:.6g}, under stock Inductor {found.stock_loss:.6g}: {apart:.2g} apart, of which "
            f"rounding explains {allowed:.2g}. {bug}"
        )
    wrong = [each for each in found.gradients if not each.ok]
    if wrong:
        worst = wrong[0]
        cure = "Try preset 'compressed' or 'exact', a smaller tolerance, or a plan of graphopt.calibrate."
        yield (
            f"The gradients of {len(wrong)} of {len(found.gradients)} parameters differ from stock Inductor's by more "
            f"than {found.options} explains: {worst.parameter} by {worst.error:.2g} (at most {worst.allowed:.2g}), "
            f"cosine {worst.cosine:.4f}. {cure if limit(found.options) else bug}"
        )
    if found.bytes >= found.stock_bytes:
        cure = "a memory_budget" if found.options.preset == "smallest" else "preset 'smallest'"
        yield (
            f"No bytes are saved: {found.bytes:,} are kept for backward, and {found.stock_bytes:,} under stock "
            f"Inductor. graphopt.explain shows which; try {cure}."
        )
    slack = found.options.value("time_slack") if found.options.planned else 0.0
    expected = 1 + (found.options.plan.time if found.options.plan is not None else slack)
    if found.step_ratio > expected + NOISE:
        yield (
            f"A step takes {found.step_ratio:.2f} times as long as under stock Inductor, where {expected:.2f} was "
            "planned. Try preset 'exact', a smaller time_slack, or more steps if others use the machine."
        )
