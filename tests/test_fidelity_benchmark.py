"""The fine-tunings of benchmarks/fidelity.py: the same for every method, on data that pre-training has not seen."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fidelity
from architectures import build
from finetuning import corpora
from finetuning.tasks import TASKS

CORPORA = (corpora.source, corpora.docstrings, corpora.masked_source, corpora.packages)


def run(monkeypatch, capsys, *arguments):
    """The results that a quick run leaves."""
    monkeypatch.setattr(sys, "argv", ["fidelity.py", "--quick", *map(str, arguments)])
    fidelity.main()
    capsys.readouterr()
    return json.loads(Path(arguments[arguments.index("--out") + 1]).read_text())


@pytest.mark.parametrize("corpus", CORPORA, ids=lambda corpus: corpus.__name__)
def test_a_seed_decides_the_batches_and_their_order(corpus):
    first, again, other = corpus(2, 32, 0), corpus(2, 32, 0), corpus(2, 32, 1)
    for step in range(3):
        assert torch.equal(first.train(step)[0], again.train(step)[0])
        assert not torch.equal(first.train(step)[0], other.train(step)[0])
    assert torch.equal(first.held_out[0], other.held_out[0])


@pytest.mark.parametrize("corpus", [corpora._docstrings, lambda: corpora._package("email")])
def test_held_out_text_is_not_trained_on(corpus):
    train, held_out = (text.numpy().tobytes() for text in corpus())
    spans = [held_out[i : i + 64] for i in range(0, len(held_out) - 64, len(held_out) // 200)]
    # a copied licence or an inherited docstring is in both
    assert sum(span in train for span in spans) <= 0.05 * len(spans)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_starts_from_the_pretrained_weights_under_every_seed(name):
    task = TASKS[name]
    torch.manual_seed(5)
    pretrained = build(task.before.spec).state_dict()
    first, second = (task.model(seed, pretrained).state_dict() for seed in (0, 1))
    # the masked model that BERT's classifier comes from has no pooler
    shared = [key for key in first if not any(part in key for part in ("lora_", "classifier", "pooler"))]
    assert shared
    assert all(torch.equal(first[key], second[key]) for key in shared)


def test_masked_words_are_the_only_targets(monkeypatch):
    x, y = corpora.masked_source(4, 64, 0).train(0)
    monkeypatch.setattr(corpora, "MASKED", 0)
    plain, _ = corpora.masked_source(4, 64, 0).train(0)
    hidden = y != corpora.IGNORED
    assert 0 < hidden.sum() < hidden.numel() / 3
    assert torch.equal(y[hidden], plain[hidden])
    assert (x[hidden] == corpora.MASK).all()
    assert torch.equal(x[~hidden], plain[~hidden])


def test_what_is_measured_is_not_measured_again(monkeypatch, capsys, tmp_path):
    out = tmp_path / "fidelity.json"
    wanted = "--tasks", "vit-lora", "--methods", "eager", "--out", out
    first = run(monkeypatch, capsys, *wanted, "--seeds", 0)
    assert [(row["task"], row["method"], row["seed"]) for row in first["rows"]] == [("vit-lora", "eager", 0)]
    first["rows"][0]["loss"] = 0.5
    out.write_text(json.dumps(first))
    second = run(monkeypatch, capsys, *wanted, "--seeds", 0, 1)
    assert [row["seed"] for row in second["rows"]] == [0, 1]
    assert second["rows"][0]["loss"] == 0.5


def test_seeds_have_nothing_of_one_another(monkeypatch, capsys, tmp_path):
    wanted = "--tasks", "vit-lora", "--methods", "eager"
    both = run(monkeypatch, capsys, *wanted, "--seeds", 0, 1, "--out", tmp_path / "both.json")
    alone = run(monkeypatch, capsys, *wanted, "--seeds", 1, "--out", tmp_path / "alone.json")
    rows = [
        {name: value for name, value in each.items() if name != "command"} for each in (both["rows"][1], *alone["rows"])
    ]
    assert rows[0] == rows[1]


def test_a_task_that_is_another_now_is_measured_anew(monkeypatch, capsys, tmp_path):
    out = tmp_path / "fidelity.json"
    wanted = "--tasks", "vit-lora", "--methods", "eager", "--seeds", 0, "--out", out
    first = run(monkeypatch, capsys, *wanted)
    for old in ({"key": "of old"}, {}):
        row = {name: value for name, value in first["rows"][0].items() if name != "key"}
        out.write_text(json.dumps({**first, "rows": [{**row, **old, "loss": 0.5}]}))
        (row,) = run(monkeypatch, capsys, *wanted)["rows"]
        assert row["loss"] != 0.5


def test_results_of_another_machine_are_put_aside(monkeypatch, capsys, tmp_path):
    out = tmp_path / "fidelity.json"
    text = json.dumps({"hardware": "another", "rows": [{"task": "vit-lora", "key": ""}]})
    out.write_text(text)
    results = run(monkeypatch, capsys, "--tasks", "vit-lora", "--methods", "eager", "--seeds", 0, "--out", out)
    assert [row["method"] for row in results["rows"]] == ["eager"]
    assert (tmp_path / "fidelity.old.json").read_text() == text


@pytest.mark.slow
def test_exact_trains_as_stock_does(monkeypatch, capsys, tmp_path):
    methods = "inductor", "lowmem:exact"
    results = run(
        monkeypatch, capsys, "--tasks", "vit-full", "--methods", *methods, "--seeds", 0, "--out", tmp_path / "a.json"
    )
    stock, exact = results["rows"]
    assert (stock["method"], exact["method"]) == methods
    assert exact["saved_bytes"] < stock["saved_bytes"]
    # float32 rounding, 1e-7 a step, times what Adam makes of it in four steps, is far below
    assert abs(exact["loss"] - stock["loss"]) < 1e-4
