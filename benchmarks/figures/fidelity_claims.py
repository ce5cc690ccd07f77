"""What the rows of fidelity.json say of training under each method beside stock. Reads results, measures nothing."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from figures.claims import Row

STOCK, EXACT, COMPRESSED = "inductor", "lowmem:exact", "lowmem:compressed"
# of a loss of order 1 in float32: roundings of order 1e-7, which a few hundred steps make larger
EXACT_DIFFERENCE = 1e-3


class Estimate(NamedTuple):
    """A mean over seeds, and its standard error; NaN for one seed."""

    mean: float
    error: float


class Change(NamedTuple):
    """A held-out figure of one task under one method, and its difference from stock, over the seeds that both have."""

    task: str
    method: str
    stock: Estimate
    own: Estimate
    difference: Estimate  # of pairs: seed by seed
    largest: float  # difference of one seed, as a magnitude

    @property
    def within(self) -> bool:
        return within_two_errors(self.difference.mean, self.stock)


def estimate(values: Sequence[float]) -> Estimate:
    mean, count = statistics.fmean(values), len(values)
    # not statistics.stdev, which raises for the NaN of a run that diverged
    squares = sum((value - mean) ** 2 for value in values)
    return Estimate(mean, math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan)


def within_two_errors(difference: float, stock: Estimate) -> bool:
    """Whether a difference of means is one that other seeds could make; of one seed nothing else can be said."""
    return math.isnan(stock.error) or abs(difference) <= 2 * stock.error


def changes(rows: Sequence[Row], figure: str = "loss") -> Iterator[Change]:
    """Every method beside stock, and stock itself, on every task that has `figure`; in the order of the rows.

    The loss of a run that diverged is NaN.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row[figure] is None and figure == "loss":
            row = {**row, figure: math.nan}
        if row[figure] is not None:
            found.setdefault((row["task"], row["method"]), {})[row["seed"]] = row[figure]
    for (task, method), own in found.items():
        stock = found.get((task, STOCK), {})
        seeds = [seed for seed in own if seed in stock]
        if seeds:
            differences = [own[seed] - stock[seed] for seed in seeds]
            yield Change(
                task,
                method,
                estimate([stock[seed] for seed in seeds]),
                estimate([own[seed] for seed in seeds]),
                estimate(differences),
                max(map(abs, differences), key=lambda each: (math.isnan(each), each)),
            )


def saved_of_stock(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Saved bytes as a share of stock's, by task and method."""
    saved = {(row["task"], row["method"]): row["saved_bytes"] for row in rows if row["saved_bytes"] is not None}
    return {(task, method): own / saved[task, STOCK] for (task, method), own in saved.items() if (task, STOCK) in saved}


def broken_promises(rows: Sequence[Row]) -> Iterator[str]:
    """Where exact is not stock, seed by seed, and where compressed trains to another loss than stock."""
    for each in changes(rows):
        if each.method == EXACT and not each.largest <= EXACT_DIFFERENCE:
            yield f"{each.task}, exact: a loss {each.largest:.4f} from stock's"
        if each.method == COMPRESSED and not each.within:
            yield (
                f"{each.task}, compressed: mean loss {each.difference.mean:+.4f} from stock's, whose standard error is "
                f"{each.stock.error:.4f}"
            )
