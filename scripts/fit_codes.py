"""Find the rows of graphopt/lowering/code_tables.py and print them; with --check, fail if the file holds others.

    relu3      the slopes of the sum of three ReLUs h~ with the least integral of (f - h~)^2; h~ has f's asymptotes, and
               joins the knots (x1, left(x1)), (x2, y2), (x3, right(x3)) by lines (LowMemoryBP, arXiv 2406.16282)
    unbiased   the least and the largest slope, and between them the two levels with the least mean variance
               E[(f'(x) - l_i) (l_i+1 - f'(x))] of a draw between neighbours, x ~ N(0, 1)
    lloyd      the four levels with the least E[(f'(x) - nearest level)^2], x ~ N(0, 1)

The published rows of gelu and silu stay as they are published; what is found is printed beside them. Nothing is random.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.lowering import code_tables
from graphopt.lowering.activations import ACTIVATIONS
from graphopt.lowering.codes import SCHEMES, Code, count

PUBLISHED = {"gelu": "REGELU2", "silu": "RESILU2"}  # names in code_tables
PUBLISHED_INTERVAL = {"gelu": math.sqrt(-2 * math.log(1e-8)), "silu": -2 * math.log(0.5e-8)}
CLOSE = 1e-8  # how near its asymptotes an activation is where other intervals end
KINKS = (-3.0, 0.0, 3.0)  # of hardswish, elu and selu
FAR = 60.0  # where every activation is its asymptote in float64
HEAD = """\
                   interval     integral   rms relu3    bias  unbiased    lloyd
"""

# what the integrals are good for: relu3 has Gauss-Legendre on smooth pieces and Newton, the others a grid of x
TOLERANCE = {"relu3": 1e-7, "unbiased": 2e-6, "lloyd": 2e-6}
NODES = 1_200_000  # of N(0, 1) in +-9, so that 0 and +-3 lie between two nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with code_tables.py; exit 1 if apart")
    check = parser.parse_args().check
    found, lines = {}, HEAD
    for name in ACTIVATIONS:
        slopes = Slopes(name)
        found[name] = rows(slopes)
        lines += figures(slopes, found[name])
    if check:
        wrong = [f"{name} {scheme}: {why}" for name in found for scheme, why in apart(name, found[name])]
        if lines not in (code_tables.__doc__ or ""):
            wrong.append("the figures in the docstring are not these:\n" + lines)
        if wrong:
            sys.exit("\n".join(wrong))
        print(f"code_tables.py holds what is found, {len(found)} activations")
        return
    print(lines, *source(found), *(line for name in PUBLISHED for line in beside_published(name)), sep="\n")


def rows(slopes: "Slopes") -> dict[str, Code]:
    """What is found for one activation, published or not."""
    return {"relu3": Relu3(slopes.name).row(), "unbiased": unbiased(slopes), "lloyd": lloyd(slopes)}


def derivative(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(activation(x).sum(), x)[0]


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Relu3:
    """The fit of three ReLUs to one activation; knots are (x1, x2, y2, x3)."""

    order = 64  # of Gauss-Legendre, on pieces that hold no knot and no kink inside

    def __init__(self, name: str) -> None:
        self.activation = ACTIVATIONS[name].function
        ends = float64(-FAR, FAR)
        self.left, at_end = self.activation(ends).tolist()
        self.right = derivative(self.activation, ends)[1].item()
        self.intercept = at_end - self.right * FAR
        self.interval = (-PUBLISHED_INTERVAL[name], PUBLISHED_INTERVAL[name]) if name in PUBLISHED else self._far()
        self.nodes, self.weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(self.order))

    def _far(self) -> tuple[float, float]:
        x = torch.linspace(-FAR, FAR, int(2000 * FAR) + 1, dtype=torch.float64)
        asymptote = torch.where(x < 0, self.left, self.intercept + self.right * x)
        inside = x[(self.activation(x) - asymptote).abs() > CLOSE]
        return round(inside[0].item(), 3), round(inside[-1].item(), 3) + 0.0  # no -0.0

    def constants(self, knots: Tensor) -> tuple[Tensor, Tensor]:
        """(a, c) of left + sum a_i relu(x - c_i)."""
        x1, x2, y2, x3 = knots.unbind()
        first, second = (y2 - self.left) / (x2 - x1), (self.intercept + self.right * x3 - y2) / (x3 - x2)
        return torch.stack([first, second - first, self.right - second]), torch.stack([x1, x2, x3])

    def knots(self, row: Code) -> Tensor:
        x1, x2, x3 = row.thresholds
        return float64(x1, x2, self.left + row.levels[1] * (x2 - x1), x3)

    def objective(self, knots: Tensor) -> Tensor:
        a, c = self.constants(knots)
        edges = torch.cat([c, float64(*self.interval, *KINKS)]).sort().values
        half = edges.diff()[:, None] / 2
        x = edges[:-1, None] + half * (1 + self.nodes)
        relus = self.left + ((x[..., None] - c).relu() * a).sum(-1)
        return ((self.activation(x) - relus) ** 2 * self.weights * half).sum()

    def minimum(self) -> Tensor:
        """The best of twelve starts. tanh and sigmoid have two optima, each other's mirror image: x2 > 0 it is."""
        starts = [(x2, *gaps) for x2 in (-1.0, 0.0, 1.0) for gaps in ((1, 1), (3, 3), (1, 4), (4, 1))]
        ends = [self._descend(*start) for start in starts]
        least = min(self.objective(knots).item() for knots in ends)
        place = max((knots for knots in ends if self.objective(knots) < least * (1 + 1e-9)), key=lambda knots: knots[1])
        for _ in range(3):  # Newton's steps
            gradient = torch.autograd.functional.jacobian(self.objective, place)
            place = place - torch.linalg.solve(self.curvature(place), gradient)
        return place

    def _descend(self, x2: float, below: float, above: float) -> Tensor:
        # logarithms of the gaps keep the knots in order
        free = float64(x2, self.activation(float64(x2)).item() - 0.1, math.log(below), math.log(above)).requires_grad_()
        search = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def knots() -> Tensor:
            x2, y2, below, above = free.unbind()
            return torch.stack([x2 - below.exp(), x2, y2, x2 + above.exp()])

        def closure() -> Tensor:
            search.zero_grad()
            value = self.objective(knots())
            value.backward()
            return value

        search.step(closure)
        return knots().detach()

    def curvature(self, knots: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(self.objective, knots)

    def row(self) -> Code:
        a, c = self.constants(self.minimum())
        first, second = (round(level, 9) for level in a.cumsum(0)[:2].tolist())
        low, middle, high = (round(threshold, 8) + 0.0 for threshold in c.tolist())  # no -0.0
        return Code((0.0, first, second, self.right), (low, middle, high))

    def slack(self, knots: Tensor, share: float) -> Tensor:
        """How far each of (a, c) can go, the others following, before the objective grows by `share`."""
        gradients = torch.autograd.functional.jacobian(lambda knots: torch.cat(self.constants(knots)), knots)
        spread = gradients @ torch.linalg.solve(self.curvature(knots), gradients.T)
        return (2 * share * self.objective(knots) * spread.diagonal()).sqrt()


class Slopes:
    """f'(x) under x ~ N(0, 1), as prefix sums over sorted slopes; x at midpoints of equal steps."""

    def __init__(self, name: str) -> None:
        self.name, activation = name, ACTIVATIONS[name].function
        self.x = (torch.arange(NODES, dtype=torch.float64) + 0.5) * (18 / NODES) - 9
        self.weight = torch.exp(-(self.x**2) / 2)
        self.weight /= self.weight.sum()
        self.at_x = derivative(activation, self.x)
        self.sorted, order = self.at_x.sort()
        mass = self.weight[order]
        sums = torch.stack([mass, mass * self.sorted, mass * self.sorted**2]).cumsum(1)
        self.sums = F.pad(sums, (1, 0))
        self.flat = derivative(activation, float64(-FAR, FAR)).unique()  # slopes that can hold probability
        self.low, self.high = self._extremes(activation)

    def _extremes(self, activation: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The least and the largest slope, limits too, as the next float32 outward."""
        bounds = []
        for sign in (-1, 1):
            step, x = FAR, float64(0)
            while step > 1e-13:
                x = torch.cat([x + step * torch.linspace(-1, 1, 10_001, dtype=torch.float64), x, float64(0, -3, 3)])
                x = x[(sign * derivative(activation, x)).argmax()][None]
                step /= 1000
            bounds.append(outward(derivative(activation, x).item(), sign))
        return bounds[0], bounds[1]

    def between(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mass, first and second moment of the slopes in (low, high]."""
        above, below = (torch.searchsorted(self.sorted, bound.contiguous(), right=True) for bound in (high, low))
        mass, first, second = self.sums[:, above] - self.sums[:, below]
        return mass, first, second

    def drawing(self, low: Tensor, high: Tensor) -> Tensor:
        """Integral of (f' - low) (high - f') over the slopes in (low, high]."""
        mass, first, second = self.between(low, high)
        return (low + high) * first - second - low * high * mass

    def rounding(self, low: Tensor, high: Tensor) -> Tensor:
        """Integral of (f' - mean)^2 over the slopes in (low, high]."""
        mass, first, second = self.between(low, high)
        return second - first**2 / mass.clamp(min=1e-300)


def outward(value: float, sign: int) -> float:
    """A short decimal not inside `value`, nor when it is rounded to float32."""
    value = round(value, 12)
    single = np.float32(value)
    if sign * float(single) < sign * value:
        single = np.nextafter(single, np.float32(sign * math.inf))
    decimals = (float(f"{single:.{digits}g}") for digits in range(7, 18))
    return next(x for x in decimals if sign * x >= sign * value and np.float32(x) == single)


def partition(cost: Callable[[Tensor, Tensor], Tensor], slopes: Slopes, pieces: int) -> Tensor:
    """The bounds of `pieces` intervals from the least to the largest slope with the least sum of costs.

    Exact on a grid of 401, which finds the basin; then on ever finer grids around the last bounds, wide enough for the
    valley of a flat cost.
    """
    low, high = float64(slopes.low), float64(slopes.high)
    grids = [torch.linspace(slopes.low, slopes.high, 401, dtype=torch.float64)] * (pieces - 1)
    step = (slopes.high - slopes.low) / 400
    while True:
        bounds = cheapest(cost, [low, *(torch.cat([grid, slopes.flat]) for grid in grids), high])
        if step < 1e-9:
            return bounds
        grids = [bound + step * torch.linspace(-8, 8, 129, dtype=torch.float64) for bound in bounds[1:-1]]
        step /= 8


def cheapest(cost: Callable[[Tensor, Tensor], Tensor], grids: list[Tensor]) -> Tensor:
    """One point of each grid, increasing, with the least sum of costs between neighbours: dynamic programming."""
    sums, choices = float64(0), []
    for left, right in pairwise(grids):
        steps = cost(*torch.broadcast_tensors(left[:, None], right[None]))
        sums, choice = (sums[:, None] + steps.where(left[:, None] < right, math.inf)).min(0)
        choices.append(choice)
    place = [0]
    for choice in reversed(choices):
        place.append(int(choice[place[-1]]))
    return torch.cat([grid[at][None] for grid, at in zip(grids, reversed(place))])


def unbiased(slopes: Slopes) -> Code:
    bounds = partition(slopes.drawing, slopes, 3).tolist()
    low, high = (bound if bound in slopes.flat.tolist() else round(bound, 7) for bound in bounds[1:-1])
    return Code((slopes.low, low, high, slopes.high))


def lloyd(slopes: Slopes) -> Code:
    bounds = partition(slopes.rounding, slopes, 4)
    mass, first, _ = slopes.between(bounds[:-1], bounds[1:])
    zero, one, two, three = (round(level, 7) for level in (first / mass).tolist())
    low, middle, high = (round((below + above) / 2, 8) for below, above in pairwise((zero, one, two, three)))
    return Code((zero, one, two, three), (low, middle, high))


def cost(slopes: Slopes, scheme: str, row: Code) -> tuple[float, float]:
    """Root mean square of (slope - f'), and mean of (slope - f'), x ~ N(0, 1)."""
    levels = float64(*row.levels)
    if row.thresholds is None:
        return math.sqrt(slopes.drawing(levels[:-1], levels[1:]).sum().item()), 0.0
    slope = levels[count(slopes.x if scheme == "relu3" else slopes.at_x, row.thresholds)]
    error = slope - slopes.at_x
    return math.sqrt((slopes.weight * error**2).sum().item()), (slopes.weight * error).sum().item()


def apart(name: str, found: dict[str, Code]) -> Iterator[tuple[str, str]]:
    """Which rows of the file are not what is found, and why."""
    for scheme in SCHEMES:
        row = code_tables.CODES[name][scheme]
        if scheme == "relu3" and name in PUBLISHED:
            fit = Relu3(name)
            published, least = (fit.objective(fit.knots(code)).item() for code in (row, found[scheme]))
            if not least <= published < least * 1.001:
                yield scheme, f"published objective {published:.7g}, least {least:.7g}"
            continue
        pairs = [*zip(row.levels, found[scheme].levels), *zip(row.thresholds or (), found[scheme].thresholds or ())]
        far = max(abs(ours - theirs) for ours, theirs in pairs)
        if far > TOLERANCE[scheme] or (row.thresholds is None) != (found[scheme].thresholds is None):
            yield scheme, f"{row} in the file, {found[scheme]} found"


def figures(slopes: Slopes, found: dict[str, Code]) -> str:
    """One line: what the rows cost; the published relu3 where there is one."""
    name, fit = slopes.name, Relu3(slopes.name)
    row = getattr(code_tables, PUBLISHED[name]) if name in PUBLISHED else found["relu3"]
    relu3, bias = cost(slopes, "relu3", row)
    drawn, nearest = (cost(slopes, scheme, found[scheme])[0] for scheme in ("unbiased", "lloyd"))
    low, high = fit.interval
    return (
        f"    {name:10} {low:7.2f} {high:6.2f}    {fit.objective(fit.knots(row)).item():.7f}   "
        f"{relu3:.4f}  {round(bias, 4) + 0.0:+.4f}   {drawn:.4f}   {nearest:.4f}\n"
    )


def source(found: dict[str, dict[str, Code]]) -> Iterator[str]:
    yield "\nCODES: dict[str, dict[str, Code]] = {"
    for name, codes in found.items():
        yield f'    "{name}": {{'
        for scheme, row in codes.items():
            text = f"Code({', '.join(map(str, row if row.thresholds else row[:1]))})"
            yield f'        "{scheme}": {PUBLISHED[name] if scheme == "relu3" and name in PUBLISHED else text},'
        yield "    },"
    yield "}"


def beside_published(name: str) -> Iterator[str]:
    fit = Relu3(name)
    knots = fit.minimum()
    published = fit.knots(getattr(code_tables, PUBLISHED[name]))
    slack = fit.slack(knots, 1e-3)
    least, theirs = fit.objective(knots).item(), fit.objective(published).item()
    yield f"\n{PUBLISHED[name]}      published        found      apart   apart where the integral is 0.1% up"
    pairs = zip(torch.cat(fit.constants(published)).tolist(), torch.cat(fit.constants(knots)).tolist(), slack.tolist())
    for label, (ours, best, room) in zip(("a1", "a2", "a3", "c1", "c2", "c3"), pairs):
        yield f"    {label}      {ours:12.7f} {round(best, 7) + 0.0:12.7f}   {abs(ours - best):.1e}   {room:.1e}"
    yield f"    integral{theirs:12.7f} {least:12.7f}   {theirs / least - 1:.1e} of it"


if __name__ == "__main__":
    main()
