"""What is concluded from measured rows: benchmarks/figures/claims.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from figures.claims import against_budgets, against_fp8, broken_promises


def row(method, units, ratio, error=0.004):
    return {
        "block": "vit-full", "method": method, "saved_units": units, "saved_of_stock": units / 16, "step_ratio": ratio,
        "gradient_error": error,
    }  # fmt: skip


def test_a_plan_answers_a_budget_with_no_more_bytes_in_no_more_time():
    rows = [row("budget-0.5", 8, 1.1), row("lowmem:exact", 9, 1.0), row("lowmem:smallest", 8, 1.13)]
    (answer,) = against_budgets(rows)
    assert answer.ours == rows[2]
    assert answer.holds
    rows[2]["step_ratio"] = 1.14  # 3 % of 1.1 is 0.033
    assert not next(against_budgets(rows)).holds


def test_a_budget_below_every_plan_has_no_answer():
    (answer,) = against_budgets([row("budget-0.1", 1, 1.2), row("lowmem:exact", 9, 1.0)])
    assert answer.ours is None
    assert not answer.holds


def test_a_plan_of_another_block_is_no_answer():
    other = {**row("lowmem:exact", 1, 1.0), "block": "llama-full"}
    assert not next(against_budgets([row("budget-0.5", 8, 1.1), other])).holds


def test_fp8_is_answered_by_fewer_bytes_and_less_error():
    fp8, plan = row("fp8", 8.7, 1.0, 0.012), row("lowmem:compressed", 5, 1.1, 0.005)
    assert next(against_fp8([fp8, plan])).ours == plan
    assert not next(against_fp8([fp8, {**plan, "gradient_error": 0.02}])).holds
    assert not next(against_fp8([fp8, {**plan, "saved_units": 8.7}])).holds
    # under dropout, where errors are not known, bytes decide
    assert next(against_fp8([{**fp8, "gradient_error": None}, {**plan, "gradient_error": None}])).holds


def test_budgets_are_kept_and_smaller_ones_cost_more():
    kept = [row("lowmem:memory_budget=0.5", 8, 1.0, 0.004), row("lowmem:memory_budget=0.25", 4, 1.1, 0.006)]
    assert not list(broken_promises(kept))
    (text,) = broken_promises([{**kept[0], "saved_of_stock": 0.51}, kept[1]])
    assert "memory_budget 0.5: saves 0.510" in text
    (text,) = broken_promises([{**kept[0], "step_ratio": 1.2}, kept[1]])
    assert "step ratio 1.1 beside 1.2" in text
    (text,) = broken_promises([{**kept[0], "gradient_error": 0.007}, kept[1]])
    assert "gradient error 0.006 beside 0.007" in text
