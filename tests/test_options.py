"""Options: misspelt ones say what was meant, Inductor's pass through, the environment stands in for none."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.lowering.codes import SCHEMES
from graphopt.options import OWN, PRESETS, RECOMPUTE, Options, parse
from graphopt.passes import NAMES


def compile_with(options=None, backend="lowmem_eager"):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    return torch.compile(model, backend=backend, options=options)(torch.randn(4, 8))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"presett": "exact"}, ["'presett'", "did you mean 'preset'", "disable"]),
        ({"preset": "exakt"}, ["preset", "did you mean 'exact'", "allowed: exact"]),
        ({"disable": ["share_norms"]}, ["did you mean 'share_norm'", "pack_mask", "canonicalize"]),
        ({"disable": "share_norm"}, ["list of pass names"]),
        ({"disable": 5}, ["list of pass names"]),
        ({"disable": None}, ["list of pass names"]),
        ({"disable": {"share_norm": 1}}, ["list of pass names"]),
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
    assert own == graphopt.Options() and patches == {"max_autotune": True, "triton.cudagraphs": False}
    with pytest.raises(graphopt.OptionsError, match=r"max_autotune.*bool"):
        parse({"max_autotune": "yes"})


def test_the_environment_is_read_where_no_options_are_given(monkeypatch):
    monkeypatch.setenv("GRAPHOPT_OPTIONS", json.dumps({"disable": ["pack_mask"]}))
    assert parse(None)[0].disable == ("pack_mask",)
    assert parse({})[0].disable == ()
    for text in ("{preset", "[1]", '{"presett": "exact"}'):
        monkeypatch.setenv("GRAPHOPT_OPTIONS", text)
        with pytest.raises(graphopt.OptionsError):
            compile_with()


def test_options_are_equal_whatever_the_order():
    names = ["share_norm", "pack_mask"]
    assert graphopt.Options(disable=names) == graphopt.Options(disable=tuple(reversed(names)))


def test_the_readme_names_every_option_preset_and_pass():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    names = [*OWN, *PRESETS, *NAMES, *SCHEMES, *RECOMPUTE]
    assert not [name for name in names if f"`{name}`" not in text and f'`"{name}"`' not in text]


def test_what_is_not_given_follows_the_preset():
    assert Options().code is None and Options().recomputed == "pointwise"
    assert Options("paper").code == "relu3" and Options("paper").recomputed == "stock"
    assert dataclasses.replace(Options(), preset="paper").code == "relu3"
    assert Options("paper", approx_activation="off").code is None
    assert Options("paper", approx_activation="lloyd", recompute="pointwise").code == "lloyd"
    assert str(Options("paper", approx_activation="off")) == "preset paper, approx_activation off"
