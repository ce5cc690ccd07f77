"""What documents say of measured rows: benchmarks/report.py, its tables and plots, and the claims about fine-tuning."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from figures.fidelity_claims import Estimate, broken_promises, changes, estimate, saved_of_stock, within_two_errors
from figures.plots import THEMES, draw_fidelity, draw_pareto, is_of, write
from figures.tables import measured_on
from figures.training_tables import render_fidelity, render_fidelity_details, render_train, render_train_details
from report import PLACES, RESULTS, Place

STOCK = (1.0, 1.1, 1.2, 1.3, 1.4)  # a standard error of sqrt(0.025 / 5) = 0.0707


def runs(method, losses, task="gpt2-full", accuracy=None, saved=100):
    return [
        {
            "task": task, "method": method, "seed": seed, "loss": loss, "accuracy": accuracy and accuracy + seed / 100,
            "saved_bytes": saved, "loss_before": 3.0, "steps_per_loss": 10, "losses": [3.0, 2.0, loss],
        }
        for seed, loss in enumerate(losses)
    ]  # fmt: skip


def fidelity(*rows):
    return {"dtype": "float32", "rows": [row for each in rows for row in each]}


def step(method, saved=50, **changed):
    return {
        "family": "llama", "size": "mini", "tuning": "lora", "precision": "bf16", "batch": 4, "length": 256,
        "method": method, "saved_bytes": saved * 2**20, "host_bytes": 0, "peak_bytes": 2 * saved * 2**20,
        "step_ratio": 1.05, "timed_steps": 15, "first_call_seconds": 12.3, "gradient_error": 0.0042, "passed": True,
        "error": None, **changed,
    }  # fmt: skip


def cells(table):
    """Rows of a Markdown table, without its head, as lists of cells."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_standard_error_is_that_of_the_mean():
    assert estimate(STOCK) == pytest.approx((1.2, math.sqrt(0.025 / 5)))
    assert math.isnan(estimate([1.0]).error)


def test_differences_are_taken_seed_by_seed():
    # seeds differ by far more than methods do: the error of the difference does not have their spread
    rows = runs("inductor", STOCK) + runs("lowmem:smallest", [loss + 0.02 for loss in STOCK])
    rows[-1]["loss"] += 0.01
    change = list(changes(rows))[1]
    assert change.difference.mean == pytest.approx(0.022)
    assert change.difference.error == pytest.approx(0.002)
    assert change.largest == pytest.approx(0.03)


def test_only_seeds_of_both_are_compared():
    rows = runs("inductor", STOCK) + runs("lowmem:exact", STOCK[:3])
    change = list(changes(rows))[1]
    assert change.stock == change.own
    assert not list(changes(runs("lowmem:exact", STOCK)))


@pytest.mark.parametrize(("difference", "within"), [(0.14, True), (-0.14, True), (0.15, False), (-0.15, False)])
def test_two_standard_errors_are_of_stock(difference, within):
    assert within_two_errors(difference, estimate(STOCK)) == within


def test_one_seed_shows_no_difference():
    assert within_two_errors(5.0, Estimate(1.0, math.nan))


def test_exact_is_stock_in_every_seed():
    stock, exact = runs("inductor", STOCK), runs("lowmem:exact", [loss + 0.0009 for loss in STOCK])
    assert not list(broken_promises(stock + exact))
    exact[2]["loss"] += 0.0002
    (text,) = broken_promises(stock + exact)
    assert "gpt2-full, exact: a loss 0.0011 from stock's" in text
    exact[2]["loss"] = math.nan
    assert list(broken_promises(stock + exact))


def test_compressed_is_within_two_standard_errors_of_stock():
    stock = runs("inductor", STOCK)
    assert not list(broken_promises(stock + runs("lowmem:compressed", [loss + 0.14 for loss in STOCK])))
    (text,) = broken_promises(stock + runs("lowmem:compressed", [loss - 0.15 for loss in STOCK]))
    assert "compressed: mean loss -0.1500" in text
    # of smallest nothing of the kind is promised
    assert not list(broken_promises(stock + runs("lowmem:smallest", [loss + 1 for loss in STOCK])))


def test_the_presets_hold_in_what_was_measured():
    path = RESULTS / "fidelity.json"
    if not path.exists():
        pytest.skip("not measured")
    assert not list(broken_promises(json.loads(path.read_text())["rows"]))


def test_saved_bytes_are_a_share_of_stock_of_the_same_task():
    rows = runs("inductor", STOCK) + runs("lowmem:exact", STOCK, saved=60) + runs("lowmem:exact", STOCK, "vit-full")
    assert saved_of_stock(rows) == {("gpt2-full", "inductor"): 1, ("gpt2-full", "lowmem:exact"): 0.6}


def test_a_difference_beyond_the_noise_is_bold():
    far, near = [loss + 0.2 for loss in STOCK], [loss + 0.1 for loss in STOCK]
    results = fidelity(
        runs("lowmem:smallest", far, saved=20), runs("inductor", STOCK), runs("lowmem:exact", near, saved=60)
    )
    text = render_fidelity(results)
    assert "| task | `inductor` | `lowmem:exact` | `lowmem:smallest` |" in text
    (line,) = cells(text)
    assert line == [
        "GPT-2, full", "1.2000 ± 0.0707<br>before: 3.00", "+0.1000 ± 0.0000<br>60%", "**+0.2000 ± 0.0000**<br>20%",
    ]  # fmt: skip


def test_classifiers_have_an_accuracy():
    results = fidelity(runs("inductor", STOCK), runs("inductor", STOCK, "vit-lora", 0.9))
    # the standard error of 0.90 ... 0.94 is sqrt(0.00025 / 5) = 0.7 %
    assert [line[1] for line in cells(render_fidelity(results))] == [
        "1.2000 ± 0.0707<br>before: 3.00",
        "1.2000 ± 0.0707<br>before: 3.00<br>92.0 ± 0.7%",
    ]


def test_a_method_that_was_not_run_is_a_dash():
    results = fidelity(
        runs("inductor", STOCK),
        runs("inductor", STOCK, "vit-full"),
        runs("lowmem:paper", STOCK, "vit-full"),
        runs("lowmem:paper", STOCK, "bert-full"),
    )
    assert [line[2] for line in cells(render_fidelity(results))] == ["–", "+0.0000 ± 0.0000<br>100%"]


def test_one_seed_has_no_error():
    text = render_fidelity(fidelity(runs("inductor", [1.2]), runs("lowmem:exact", [1.3])))
    assert "over 1 seed under" in text
    assert cells(text) == [["GPT-2, full", "1.2000<br>before: 3.00", "+0.1000<br>100%"]]


def test_details_say_what_does_not_hold():
    exact = [*STOCK[:4], STOCK[4] + 0.005]
    text = render_fidelity_details(fidelity(runs("inductor", STOCK), runs("lowmem:exact", exact, saved=60)))
    assert cells(text)[1][1:] == ["`lowmem:exact`", "1.2010 ± 0.0714", "+0.0010 ± 0.0010", "0.0050", "", "60%"]
    assert text.endswith("- gpt2-full, exact: a loss 0.0050 from stock's")


def test_steps_are_shares_of_stock():
    rows = [step("lowmem:exact", 30, step_ratio=1.1), step("inductor", step_ratio=1.0), step("eager", 60)]
    text = render_train({"rows": rows})
    assert "(median of 15 pairs)" in text
    assert "| model | size, batch × length | `inductor` | `lowmem:exact` |" in text
    assert cells(text) == [["Llama, LoRA, bf16", "mini, 4 × 256", "100% / 100% / 1.00", "60% / 60% / 1.10"]]


def test_steps_that_failed_are_not_hidden():
    nothing = {"saved_bytes": None, "peak_bytes": None, "step_ratio": None, "first_call_seconds": None,
               "gradient_error": None, "passed": False}  # fmt: skip
    rows = [
        step("inductor"),
        step("fp8", **nothing, error="RuntimeError: CUDA only"),
        step("lowmem:exact", 30, passed=False, step_ratio=None, gradient_error=0.5),
        step("inductor", family="vit"),
        step("lowmem:exact", family="bert"),
    ]
    text = render_train({"rows": rows})
    assert [line[2:] for line in cells(text)] == [
        ["100% / 100% / 1.05", "failed", "60% / 60% / –"],
        ["100% / 100% / 1.05", "–", "–"],
        ["–", "–", "–"],
    ]
    costs = render_train_details({"rows": rows}).split("\n\n")[-1]
    assert cells(costs)[0][2:] == ["1.05 / 12 s / 0.0042", "failed", "– / 12 s / (0.5000)"]


def test_details_have_every_method_and_the_host():
    rows = [step("inductor"), step("save_on_cpu", 0, host_bytes=50 * 2**20), step("eager", 60)]
    sizes = render_train_details({"rows": rows}).split("\n\n")[1]
    assert "| `inductor` | `eager` | `save_on_cpu` |" in sizes
    assert cells(sizes)[0][2:] == ["50.0 / 100.0", "60.0 / 120.0", "0.0 / 0.0<br>50.0 on the host"]


def test_provenance_is_said_where_it_is_known():
    assert measured_on({"torch": "2.13.0", "rows": []}, ["torch"]) == ""
    known = {"hardware": "A processor, 2 cores", "versions": {"python": "3.11", "torch": "2.13.0", "triton": "3.7.1"}}
    one = {"commit": "5a6bd9a", "command": "python benchmarks/codes.py --draws 16"}
    assert measured_on({**known, **one, "rows": []}, ["torch"]) == (
        "<sub>Measured on A processor, 2 cores; torch 2.13.0; commit 5a6bd9a: "
        "`python benchmarks/codes.py --draws 16`</sub>"
    )
    other = {"commit": "61c97e8+", "command": "python benchmarks/codes.py"}
    assert measured_on({**known, "rows": [one, other, one]}, ["torch", "triton", "peft"]) == (
        "<sub>Measured on A processor, 2 cores; torch 2.13.0, triton 3.7.1; commits 5a6bd9a, 61c97e8+: "
        "`python benchmarks/codes.py`</sub>"
    )
    outside = {"commit": None, "command": "python benchmarks/codes.py"}
    assert measured_on({**known, **outside, "rows": []}, []).endswith("2 cores; `python benchmarks/codes.py`</sub>")


@pytest.fixture
def place():
    return Place("README.md", "figures", "made-up*.json", lambda results: rf"\1 {results['rows']}")


def test_figures_stand_between_their_markers(place, tmp_path):
    known = {"hardware": "A processor", "versions": {}}
    (tmp_path / "made-up-1.json").write_text(json.dumps({"rows": [], **known}))
    (tmp_path / "made-up-2.json").write_text(json.dumps({"rows": [{}]}))
    old = "before\n<!-- figures:begin -->\nold\n<!-- figures:end -->\nbehind\n"
    new = place.filled(old, tmp_path)
    body = "\\1 []\n\n<sub>Measured on A processor</sub>\n\n\\1 [{}]"
    assert new == f"before\n<!-- figures:begin -->\n{body}\n<!-- figures:end -->\nbehind\n"
    assert place.filled(new, tmp_path) == new


def test_results_are_missed_only_where_a_document_has_their_markers(place, tmp_path):
    assert place.filled("no figures", tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"README.md has figures of made-up\*.json"):
        place.filled("<!-- figures:begin -->\n<!-- figures:end -->", tmp_path)


def test_no_two_places_are_the_same():
    assert len({(place.document, place.marker) for place in PLACES}) == len(PLACES)


BLOCKS = [
    {"block": "vit-full", "method": method, "saved_of_stock": saved, "step_ratio": 1.1, "gradient_error": 0.004}
    for method, saved in (("inductor", 1.0), ("budget-0.5", 0.5), ("lowmem:exact", 0.6))
]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(
    ("draw", "rows", "suffix"), [(draw_pareto, BLOCKS, ".svg"), (draw_fidelity, runs("inductor", STOCK), ".png")]
)
def test_a_plot_names_the_figures_it_was_drawn_from(draw, rows, suffix, theme, tmp_path):
    path = tmp_path / f"plot{suffix}"
    assert not is_of({"rows": rows}, path)
    write(draw, {"rows": rows}, theme, path)
    assert is_of({"rows": rows}, path)
    assert not is_of({"rows": rows[1:]}, path)
    first = path.read_bytes()
    write(draw, {"rows": rows}, theme, path)
    assert path.read_bytes() == first


def test_text_has_the_colour_of_its_page(tmp_path):
    for theme, colours in THEMES.items():
        path = tmp_path / f"{theme}.svg"
        write(draw_pareto, {"rows": BLOCKS}, theme, path)
        text = path.read_text()
        assert ">saved bytes, of stock's</text>" in text
        assert f"fill: {colours.text}" in text
        assert f"fill: {colours.background}" in text
        assert not any(f"fill: {other.text}" in text for name, other in THEMES.items() if name != theme)
