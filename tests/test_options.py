"""Options: wrong ones say what is allowed, Inductor's pass through, the environment stands in for none."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import PlanError
from graphopt.lowering.codes import SCHEMES
from graphopt.options import OWN, PRESETS, RECOMPUTE, ROUNDING, Options, parse
from graphopt.passes import NAMES


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


@pytest.fixture(scope="module")
def captured():
    torch.manual_seed(0)
    return graphopt.capture(network(), torch.randn(256, 64))


@pytest.fixture(scope="module")
def plan(captured):
    """A plan that encodes something, which takes time in a network this narrow."""
    made = captured.lowmem(Options(time_slack=1))[2].plan
    assert "int8" in {choice.decision for choice in made.choices}
    return made


def compile_with(options=None, backend="lowmem_eager"):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    return torch.compile(model, backend=backend, options=options)(torch.randn(4, 8))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"presett": "exact"}, ["'presett'", "did you mean 'preset'", "disable"]),
        ({"preset": "exakt"}, ["preset", "did you mean 'exact'", "allowed: compressed, smallest, exact, paper"]),
        ({"disable": ["share_norms"]}, ["did you mean 'share_norm'", "pack_mask", "canonicalize"]),
        ({"disable": "share_norm"}, ["list of pass names"]),
        ({"disable": 5}, ["list of pass names"]),
        ({"disable": None}, ["list of pass names"]),
        ({"disable": {"share_norm": 1}}, ["list of pass names"]),
        ({"rounding": "up"}, ["rounding", "'up'", "allowed: nearest, stochastic"]),
        ({"recompute": "all"}, ["recompute", "'all'", "allowed: stock, pointwise, any"]),
        ({"approx_activation": "relu4"}, ["approx_activation", "did you mean 'relu3'", "allowed: relu3"]),
        ({"tolerance": -0.1}, ["tolerance", "at least 0", "-0.1"]),
        ({"tolerance": math.nan}, ["tolerance", "at least 0", "nan"]),
        ({"tolerance": "0.1"}, ["tolerance", "at least 0", "'0.1'"]),
        ({"tolerance": True}, ["tolerance", "at least 0", "True"]),
        ({"time_slack": -1}, ["time_slack", "at least 0", "-1"]),
        ({"time_slack": [0.1]}, ["time_slack", "at least 0", "[0.1]"]),
        ({"memory_budget": 0}, ["memory_budget", "fraction above 0 and up to 1", "whole number of bytes", "not 0"]),
        ({"memory_budget": -0.5}, ["memory_budget", "fraction above 0 and up to 1", "-0.5"]),
        ({"memory_budget": 1.5}, ["memory_budget", "whole number of bytes", "1.5"]),
        ({"memory_budget": "50%"}, ["memory_budget", "fraction above 0 and up to 1", "'50%'"]),
        ({"memory_budget": True}, ["memory_budget", "fraction above 0 and up to 1", "True"]),
        ({"memory_budget": math.inf}, ["memory_budget", "whole number of bytes", "inf"]),
        ({"group_size": 48}, ["group_size", "16, 32, 64, 128, 256, 512, 1024", "48"]),
        ({"group_size": 8}, ["group_size", "16, 32", "not 8"]),
        ({"group_size": "64"}, ["group_size", "16, 32", "'64'"]),
        ({"group_size": 128.0}, ["group_size", "16, 32", "128.0"]),
        ({"plan": 5}, ["plan", "graphopt.Plan", "path", "not 5"]),
        ({"preset": "paper", "memory_budget": 0.5}, ["'paper'", "memory_budget"]),
        ({"preset": "paper", "tolerance": 0.1}, ["'tolerance'", "'preset' of 'paper'"]),
        ({"preset": "exact", "tolerance": 0.1}, ["'exact'", "no tolerance"]),
        ({"preset": "exact", "codecs": ["int8"]}, ["'exact'", "no codecs"]),
        ({"memory_budget": 0.5, "disable": ["encode"]}, ["'memory_budget'", "'disable' of 'encode'"]),
        ({"memory_budget": 0.5, "recompute": "stock"}, ["'memory_budget'", "'recompute' of 'stock'"]),
        ({"codecs": ["int8"], "recompute": "stock"}, ["'codecs'", "'recompute' of 'stock'"]),
        ({"time_slack": 10**400}, ["time_slack", "at least 0"]),
        ({"rounding": torch.zeros(2)}, ["rounding", "nearest, stochastic"]),
        ({"codecs": ["bits"]}, ["'codecs'", "for masks"]),
        ({"codecs": ["int8-\u00b2"]}, ["'codecs'", "int8-\u00b2"]),
        ({"codecs": ["int4"], "tolerance": 0.01}, ["'codecs'", "'tolerance'", "0.01"]),
        ({"max_autotun": True}, ["did you mean 'max_autotune"]),
        ({"custom_partitioner_fn": None}, ["custom_partitioner_fn", "partitioner itself"]),
    ],
)
@pytest.mark.parametrize("backend", ["lowmem", "lowmem_eager"])
def test_a_wrong_option_says_what_was_meant(backend, options, words):
    with pytest.raises(graphopt.OptionsError) as error:
        compile_with(options, backend)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_inductors_options_pass_through():
    own, patches = parse({"preset": "exact", "max_autotune": True, "triton.cudagraphs": False})
    assert own == graphopt.Options("exact") and patches == {"max_autotune": True, "triton.cudagraphs": False}
    with pytest.raises(graphopt.OptionsError, match=r"max_autotune.*bool"):
        parse({"max_autotune": "yes"})


def test_the_environment_is_read_where_no_options_are_given(monkeypatch):
    monkeypatch.setenv("GRAPHOPT_OPTIONS", json.dumps({"disable": ["pack_mask"]}))
    assert parse(None)[0].disable == ("pack_mask",)
    assert parse({})[0].disable == ()
    for text in ("{preset", "[" * 100_000, "[1]", '{"presett": "exact"}'):
        monkeypatch.setenv("GRAPHOPT_OPTIONS", text)
        with pytest.raises(graphopt.OptionsError):
            compile_with()


def test_options_are_equal_whatever_the_order():
    names = ["share_norm", "pack_mask"]
    assert graphopt.Options(disable=names) == graphopt.Options(disable=tuple(reversed(names)))


OTHERS = {
    "preset": "smallest", "memory_budget": 0.5, "tolerance": 0.02, "time_slack": 0.2, "codecs": ("fp8",),
    "group_size": 128,
    "rounding": "stochastic", "approx_activation": "lloyd", "recompute": "any", "disable": ("encode",),
}  # fmt: skip


def test_no_two_settings_go_by_one_name_in_the_caches(plan):
    """The key of a compiled graph is the text of its options."""
    first, *rest = plan.choices
    coarser = dataclasses.replace(plan, choices=(dataclasses.replace(first, decision="int4"), *rest))
    settings = [{}, *({name: value} for name, value in OTHERS.items()), {"plan": plan}, {"plan": coarser}]
    settings += [{"memory_budget": 1.0}, {"memory_budget": 100_000}, {"tolerance": 0.0}, {"tolerance": 0.0200001}]
    settings += [{"preset": name} for name in PRESETS if name not in ("compressed", "smallest")]
    assert {name for each in settings for name in each} == set(OWN)
    found = [repr(Options(**each)) for each in settings]
    assert len(set(found)) == len(found)
    assert found == [repr(Options(**each)) for each in settings]


def test_the_readme_names_every_option_preset_and_pass():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    names = [*OWN, *PRESETS, *NAMES, *SCHEMES, *RECOMPUTE, *ROUNDING]
    assert not [name for name in names if f"`{name}`" not in text and f'`"{name}"`' not in text]


def test_what_is_not_given_follows_the_preset():
    assert Options() == Options("compressed")
    assert Options().code is None and Options().value("recompute") == "pointwise"
    assert 0 < Options().value("tolerance") < Options("smallest").value("tolerance")
    assert Options("smallest").code == "unbiased" and Options("smallest").value("rounding") == "stochastic"
    assert Options("exact").code is None and Options("exact").value("tolerance") == 0
    assert Options("paper").code == "relu3" and Options("paper").value("recompute") == "stock"
    assert dataclasses.replace(Options(), preset="paper").code == "relu3"
    assert Options("paper", approx_activation="off").code is None
    assert Options("paper", approx_activation="lloyd", recompute="pointwise").code == "lloyd"
    assert Options("paper", recompute="pointwise", tolerance=0.02).value("tolerance") == 0.02
    assert str(Options("paper", approx_activation="off")) == "preset paper, approx_activation off"
    assert str(Options(tolerance=0.0, disable=["pack_mask"])) == "preset compressed, tolerance 0.0, without pack_mask"


def test_a_budget_has_no_other_limit_unless_it_is_given():
    assert Options(memory_budget=0.5).value("tolerance") == math.inf
    assert Options(memory_budget=0.5).value("recompute") == "any"
    assert Options(memory_budget=0.5, tolerance=0.02, recompute="pointwise").value("tolerance") == 0.02
    assert Options(memory_budget=0.5, tolerance=0.02, recompute="pointwise").value("recompute") == "pointwise"
    assert Options("exact", memory_budget=0.5).value("tolerance") == 0


def saved(captured, **options):
    return sum(each.bytes for each in captured.lowmem(Options(**options))[0])


def test_a_budget_that_cannot_be_met_says_what_can_be(captured):
    least = {}
    for preset in ("compressed", "exact"):
        with pytest.raises(PlanError, match="memory_budget") as error:
            saved(captured, preset=preset, memory_budget=2)
        least[preset] = int(re.search(r"the least is ([\d,]+) bytes", str(error.value))[1].replace(",", ""))
        assert saved(captured, preset=preset, memory_budget=least[preset]) <= least[preset]
        with pytest.raises(PlanError, match="memory_budget"):
            saved(captured, preset=preset, memory_budget=least[preset] - 1)
    assert least["compressed"] < least["exact"]


@pytest.mark.parametrize("backend", ["lowmem", "lowmem_eager"])
def test_a_budget_that_cannot_be_met_is_no_silent_eager(backend):
    with pytest.raises(PlanError, match="the least is"):
        torch.compile(network(), backend=backend, options={"memory_budget": 2})(torch.randn(256, 64))


def test_a_graph_that_saves_little_is_not_held_to_a_fraction_out_of_reach():
    """A loss behind a graph break saves a statistic or two, and the budget is for the model."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network()

        def forward(self, x):
            h = self.model(x)
            torch._dynamo.graph_break()
            return torch.logsumexp(h, -1).square().mean()

    compiled, x = torch.compile(Broken(), backend="lowmem_eager", options={"memory_budget": 0.3}), torch.randn(2048, 64)
    compiled(x).backward()
    with pytest.raises(PlanError, match="cannot be reached"):
        torch.compile(network(), backend="lowmem_eager", options={"memory_budget": 0.001})(x)


def test_a_plan_may_be_given_by_its_path(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert Options(plan=str(tmp_path / "plan.json")) == Options(plan=tmp_path / "plan.json") == Options(plan=plan)
    data = json.loads((tmp_path / "plan.json").read_text())
    assert Options(plan=data) == Options(plan={"version": 1, **dataclasses.asdict(plan)}) == Options(plan=plan)
    with pytest.raises(graphopt.OptionsError, match=r"'paper'.*plan"):
        Options("paper", plan=plan)


def test_a_plan_is_followed_whatever_the_preset_would_have_planned(captured, plan):
    followed = captured.lowmem(Options("smallest", plan=plan, approx_activation="off"))[2].plan
    assert followed == plan


def test_a_plan_is_followed_where_it_fits_the_budget(captured, plan):
    exact = saved(captured, preset="exact")  # which would do by itself
    assert plan.bytes < exact
    assert captured.lowmem(Options(plan=plan, memory_budget=exact))[2].plan == plan
    with pytest.raises(PlanError, match=rf"saves {plan.bytes:,} bytes, and 'memory_budget' allows {plan.bytes - 1:,}"):
        saved(captured, plan=plan, memory_budget=plan.bytes - 1)


CORRUPT = {
    "no version": (lambda plan: plan.pop("version"), ["version 1"]),
    "another version": (lambda plan: plan.update(version=2), ["version 1"]),
    "no graph": (lambda plan: plan.pop("graph"), ["'graph'", "missing"]),
    "no choices": (lambda plan: plan.pop("choices"), ["list of choices"]),
    "choices of another kind": (lambda plan: plan.update(choices="none"), ["list of choices"]),
    "a choice of another kind": (lambda plan: plan["choices"].append(5), ["choice", "not an object"]),
    "a choice without a decision": (
        lambda plan: plan["choices"][0].pop("decision"), ["choice 0", "'decision'", "missing"]
    ),
    "a choice without a shape": (lambda plan: plan["choices"][0].pop("shape"), ["choice 0", "'shape'"]),
    "an unknown decision": (
        lambda plan: plan["choices"][0].update(decision="int3"), ["choice 0", "'int3'", "keep", "recompute", "int8"]
    ),
    "a decision of another type": (lambda plan: plan["choices"][0].update(decision=8), ["choice 0", "'decision'", "8"]),
    "a number as text": (lambda plan: plan.update(bytes="many"), ["'bytes'", "'many'"]),
    "a flag as a number": (lambda plan: plan.update(time=True), ["'time'", "True"]),
    "an unknown field": (lambda plan: plan.update(colour="blue"), ["'colour'", "not known"]),
    "a shape of text": (lambda plan: plan["choices"][0].update(shape=["a"]), ["choice 0", "'shape'"]),
}  # fmt: skip


@pytest.mark.parametrize("change, words", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_plan_says_what_is_wrong(plan, tmp_path, change, words):
    path = tmp_path / "plan.json"
    plan.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError) as error:
        Options(plan=path)
    assert all(word in str(error.value) for word in ["plan.json", *words]), str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"keep", b"[" * 100_000, b"\xff\xfe\x00", b"[1, 2]", b"null"])
def test_a_file_that_is_no_plan_is_named(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json"):
        Options(plan=str(tmp_path / "plan.json"))


@pytest.mark.parametrize("backend", ["lowmem", "lowmem_eager"])
def test_a_plan_that_is_not_there_is_no_silent_eager(tmp_path, backend):
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        compile_with({"plan": str(tmp_path / "nowhere.json")}, backend)
    with pytest.raises(PlanError, match="cannot be read"):
        Options(plan=tmp_path)
