"""Write every figure of benchmarks/results into the documents, and draw every plot; --check only compares.

    python benchmarks/report.py            # make report
    python benchmarks/report.py --check    # part of make check

Figures stand between two markers, <!-- name:begin --> and <!-- name:end -->. Documents without the markers, and plots
of results that are not there, are passed over.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from figures.kernel_tables import render_block_traffic, render_codecs, render_codes, render_cubins, render_traffic
from figures.plots import THEMES, Draw, draw_fidelity, draw_pareto, is_of, write
from figures.tables import (
    Row,
    measured_on,
    render_answers,
    render_blocks,
    render_budgets,
    render_first_call,
    render_glance,
)
from figures.training_tables import render_fidelity, render_fidelity_details, render_train, render_train_details

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRITON, MODELS = ("torch", "triton"), ("torch", "transformers", "peft")


class Place(NamedTuple):
    """Where figures stand: a document, the name of its markers, the files of results and what makes text of one."""

    document: str
    marker: str
    results: str
    render: Callable[[Row], str]
    packages: tuple[str, ...] = ("torch",)

    def filled(self, old: str, folder: Path = RESULTS) -> str | None:
        """The document with the present figures; None where it has no such place."""
        begin, end = f"<!-- {self.marker}:begin -->", f"<!-- {self.marker}:end -->"
        if begin not in old:
            return None
        if end not in old:
            raise FileNotFoundError(f"{self.document} has {begin} without {end}")
        found = [json.loads(path.read_text()) for path in sorted(folder.glob(self.results))]
        if not found:
            raise FileNotFoundError(f"{self.document} has figures of {self.results}, which benchmarks/results lacks")
        parts = (part for each in found for part in (self.render(each), measured_on(each, self.packages)) if part)
        body = "\n\n".join(parts)
        return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{body}\n{end}", old, flags=re.DOTALL)


class Plot(NamedTuple):
    """A plot of one file of results, in a file for each theme: docs/pareto-light.svg, docs/pareto-dark.svg."""

    name: str
    suffix: str
    results: str
    draw: Draw

    def files(self) -> Iterator[tuple[str, Path]]:
        for theme in THEMES:
            yield theme, ROOT / "docs" / f"{self.name}-{theme}{self.suffix}"


PLACES = (
    Place("README.md", "glance", "blocks.json", render_glance),
    Place("README.md", "train", "train.json", render_train, MODELS),
    Place("README.md", "fidelity", "fidelity.json", render_fidelity, MODELS),
    Place("docs/choosing.md", "fidelity details", "fidelity.json", render_fidelity_details, MODELS),
    Place("docs/choosing.md", "train details", "train.json", render_train_details, MODELS),
    Place("docs/choosing.md", "first call", "first_call.json", render_first_call, MODELS),
    Place("docs/pareto.md", "blocks", "blocks.json", render_blocks),
    Place("docs/pareto.md", "budgets", "pareto.json", render_budgets),
    Place("docs/pareto.md", "answers", "pareto.json", render_answers),
    Place("docs/pareto.md", "precisions", "blocks-*.json", render_blocks),
    Place("docs/lowering.md", "traffic", "traffic.json", render_traffic, TRITON),
    Place("docs/lowering.md", "block traffic", "block_traffic.json", render_block_traffic, TRITON),
    Place("docs/lowering.md", "cubins", "cubins.json", render_cubins, TRITON),
    Place("docs/codes.md", "codes", "codes.json", render_codes),
    Place("docs/codecs.md", "codecs", "codecs.json", render_codecs, TRITON),
)
PLOTS = (
    Plot("pareto", ".svg", "pareto.json", draw_pareto),
    Plot("fidelity", ".png", "fidelity.json", draw_fidelity),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the figures of benchmarks/results into the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    check = parser.parse_args().check
    wrong = [*texts(check), *plots(check)]
    if check and wrong:
        sys.exit("\n".join(wrong))
    for text in wrong:
        print(text)


def texts(check: bool) -> Iterator[str]:
    """Write the figures of every document, unless `check`; what is wrong."""
    for place in PLACES:
        path = ROOT / place.document
        old = path.read_text() if path.exists() else ""
        try:
            new = place.filled(old)
        except FileNotFoundError as error:
            yield str(error)
            continue
        if new is None:
            if not check and any(RESULTS.glob(place.results)):
                print(f"{place.document} has no <!-- {place.marker}:begin -->: {place.results} is not shown there")
        elif new != old and check:
            yield f"figures '{place.marker}' of {place.document} are not those of {place.results}: make report"
        elif new != old:
            path.write_text(new)


def plots(check: bool) -> Iterator[str]:
    """Draw every plot, unless `check`; which of them are missing, or of other results."""
    for plot in PLOTS:
        source = RESULTS / plot.results
        if not source.exists():
            continue
        results = json.loads(source.read_text())
        for theme, path in plot.files():
            if not check:
                write(plot.draw, results, theme, path)
            elif not is_of(results, path):
                yield f"{path.relative_to(ROOT)} is not drawn from {plot.results}: make report"


if __name__ == "__main__":
    main()
