"""What the rows of pareto.json say of lowmem beside torch's own ways to save bytes. Reads results, measures nothing."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
BUDGET, LOWMEM, LOWMEM_BUDGET = "budget-", "lowmem:", "lowmem:memory_budget="
NOISE = 0.03  # of a ratio of step times


class Answer(NamedTuple):
    """One of torch's ways to save bytes in a block, and what lowmem has against it; None where it has nothing."""

    theirs: Row
    ours: Row | None
    holds: bool


def against_budgets(rows: Sequence[Row]) -> Iterator[Answer]:
    """To each activation_memory_budget the fastest plan with no more bytes, which should be no slower."""
    for theirs in rows:
        if theirs["method"].startswith(BUDGET):
            ours = _fastest(row for row in _lowmem(rows, theirs) if row["saved_units"] <= theirs["saved_units"])
            yield Answer(theirs, ours, ours is not None and no_slower(ours, theirs))


def against_fp8(rows: Sequence[Row]) -> Iterator[Answer]:
    """To the fp8 pass the fastest plan with fewer bytes and less error; under dropout errors are not known."""
    for theirs in rows:
        if theirs["method"] == "fp8":
            error = theirs["gradient_error"]
            ours = _fastest(
                row
                for row in _lowmem(rows, theirs)
                if row["saved_units"] < theirs["saved_units"] and (error is None or row["gradient_error"] < error)
            )
            yield Answer(theirs, ours, ours is not None)


def broken_promises(rows: Sequence[Row]) -> Iterator[str]:
    """Memory budgets that are not kept, and smaller ones that are faster, or have less error, than larger ones."""
    for block in dict.fromkeys(row["block"] for row in rows):
        found = [row for row in rows if row["block"] == block and row["method"].startswith(LOWMEM_BUDGET)]
        found.sort(key=budget, reverse=True)
        for row in found:
            if row["saved_of_stock"] > budget(row):
                yield f"{block}, memory_budget {budget(row):g}: saves {row['saved_of_stock']:.3f} of stock"
        for larger, smaller in itertools.pairwise(found):
            pair = f"{block}, memory_budget {budget(smaller):g} beside {budget(larger):g}"
            if not no_slower(larger, smaller):
                yield f"{pair}: step ratio {smaller['step_ratio']} beside {larger['step_ratio']}"
            # rounding alone moves an error by its last digits
            if larger["gradient_error"] is not None and larger["gradient_error"] > 1.1 * smaller["gradient_error"]:
                yield f"{pair}: gradient error {smaller['gradient_error']} beside {larger['gradient_error']}"


def budget(row: Row) -> float:
    """The fraction of a method lowmem:memory_budget=FRACTION."""
    return float(row["method"].removeprefix(LOWMEM_BUDGET))


def no_slower(row: Row, other: Row) -> bool:
    return bool(row["step_ratio"] <= (1 + NOISE) * other["step_ratio"])


def _lowmem(rows: Sequence[Row], beside: Row) -> list[Row]:
    return [row for row in rows if row["block"] == beside["block"] and row["method"].startswith(LOWMEM)]


def _fastest(rows: Iterator[Row]) -> Row | None:
    return min(rows, key=lambda row: float(row["step_ratio"]), default=None)
