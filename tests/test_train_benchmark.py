"""Steps of whole models, and the largest that fits: benchmarks/train.py and what it is made of."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import train
from measuring.fit import RESOLUTION, largest
from measuring.gate import allowed_error, approximation
from measuring.steps import Job, Setting, distance

EPS = torch.finfo(torch.bfloat16).eps


def script(monkeypatch, arguments, command=train.main):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    command()


@given(limit=st.integers(0, 10**6), start=st.integers(1, 16), step=st.sampled_from((1, 8)))
def test_the_largest_that_fits_is_found_to_a_sixteenth_with_no_trial_far_above_it(limit, start, step):
    start, tried = start * step, []

    def fits(value):
        tried.append(value)
        return value <= limit

    found = largest(fits, start, step)
    if limit < start:
        assert found == 0
        assert tried == [start]
        return
    assert found <= limit
    assert found % step == 0
    assert limit < found + max(step, found // RESOLUTION)
    assert max(tried) <= 2 * limit
    assert len(set(tried)) == len(tried)
    # doublings, then halvings of an interval that was an answer wide
    assert len(tried) <= math.log2(limit / start) + 2 + math.log2(RESOLUTION) + 1


def test_a_method_said_to_be_exact_may_err_as_stock_does():
    for method in (
        "eager",
        "inductor",
        "budget-0.5",
        "aggressive",
        "checkpoint",
        "save_on_cpu",
        "liger",
        "lowmem:exact",
    ):
        assert approximation(method) == 0
        # twice stock's error, and one rounding: eps wide, even, so of variance eps^2 / 12
        assert allowed_error(method, 0.004, torch.bfloat16) == pytest.approx(0.008 + EPS / 12**0.5)


def test_an_approximate_method_may_err_as_its_codecs_do():
    exact = allowed_error("lowmem:exact", 0.004, torch.bfloat16)
    # tolerances of 0.01 and 0.15, twice: a gradient has its input's error, and that of what it came through
    assert allowed_error("lowmem:compressed", 0.004, torch.bfloat16) == pytest.approx(exact + 0.02)
    assert allowed_error("lowmem", 0.004, torch.bfloat16) == pytest.approx(exact + 0.02)
    assert allowed_error("lowmem:smallest", 0.004, torch.bfloat16) == pytest.approx(exact + 0.3)
    assert exact + 0.1 < allowed_error("lowmem:paper", 0.004, torch.bfloat16) < 0.5
    # three bits of mantissa: eps is 1 / 8
    assert allowed_error("fp8", 0.004, torch.bfloat16) == pytest.approx(exact + 2 / 8 / 12**0.5)


def test_beside_stock_without_a_reference_half_of_the_digits_agree():
    assert allowed_error("eager", None, torch.bfloat16) == pytest.approx(EPS**0.5)


def test_a_nan_never_passes():
    assert not math.nan <= allowed_error("lowmem:smallest", 0.004, torch.bfloat16)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_checkpointed_adapters_train_in_one_graph_as_without(family):
    job = Job.of(Setting(family, "tiny", "lora", "bf16", batch=1, length=16, layers=1), torch.device("cpu"))
    found = []
    for function in (
        job.with_loss("eager"),
        torch.compile(job.with_loss("checkpoint"), backend="aot_eager", fullgraph=True),
    ):
        job.zero_grad()
        function(job.x, job.y).backward()
        found.append({name: each.grad for name, each in job.trained.items()})
    # the same operators on the same numbers
    assert distance(*found) == 0


@pytest.mark.slow
def test_rows_have_bytes_time_and_a_gradient_error_and_are_measured_once(monkeypatch, capsys, tmp_path):
    out = tmp_path / "train.json"
    arguments = "--quick", "--methods", "eager", "lowmem_eager:exact", "save_on_cpu", "--out", out
    script(monkeypatch, arguments)
    assert "save_on_cpu is left out" in capsys.readouterr().out or torch.cuda.is_available()
    results = json.loads(out.read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert results["versions"]["torch"] == torch.__version__
    assert rows.keys() >= {"inductor", "eager", "lowmem_eager:exact"}
    for row in rows.values():
        assert row["error"] is None
        assert row["passed"]
        assert row["step_ratio"] > 0
        assert row["peak_bytes"] > 0
        # an image of 8 x 8 in patches of 2 x 2, and the token of class
        assert (row["family"], row["size"], row["batch"], row["length"]) == ("vit", "tiny", 2, 17)
        assert row["command"].startswith("python benchmarks/train.py --quick")
    assert 0 < rows["lowmem_eager:exact"]["saved_bytes"] < rows["inductor"]["saved_bytes"]
    assert rows["inductor"]["tokens_per_second"] > 0

    script(monkeypatch, arguments)
    assert "saved" not in capsys.readouterr().out
    assert json.loads(out.read_text()) == results


def test_what_was_timed_by_other_steps_or_failed_is_measured_again():
    setting = dict.fromkeys(train.AXES, 1)
    rows = [
        {**setting, "method": "fp8", "error": None, "timed_steps": 15},
        {**setting, "method": "eager", "error": None, "timed_steps": 2},
        {**setting, "method": "inductor", "error": "RuntimeError: out of memory", "timed_steps": 15},
        {**setting, "batch": 2, "method": "checkpoint", "error": None, "timed_steps": 15},
        {**setting, "method": "lowmem", "error": None},
    ]
    assert train.measured(rows, setting, 15) == {"fp8"}
    assert train.measured(rows, setting, None) == {"lowmem"}


REFUSED = {
    "--size 8b": "no '8b' of gpt2, bert, vit; gpt2 has tiny, mini, small",
    "--methods lowmem:smalest": "option 'preset': 'smalest' (did you mean 'smallest'?)",
    "--methods turbo": "'turbo' is no method; there is inductor, eager",
    "--fit 1 --vary length": "leave vit out",
    "--quick": "needs --out",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_is_not_there_is_named(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit):
        script(monkeypatch, arguments.split(), train.parse)
    assert REFUSED[arguments] in capsys.readouterr().err
