"""The runner: a failing pass is named, a pass can be switched off, what was done is on record."""

import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt import passes
from graphopt.pipeline import blamed


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2), nn.Dropout(0.5))


def crashes(gm, example_inputs):
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.native_layer_norm.default:
            raise KeyError("no such thing")
    return gm


def leaves_a_bad_graph(gm, example_inputs):
    first, *_, last = gm.graph.nodes
    last.prev.append(first)
    return gm


@pytest.mark.parametrize("backend", ["lowmem", "lowmem_eager"])
@pytest.mark.parametrize("bug", [crashes, leaves_a_bad_graph])
def test_a_bug_in_a_pass_names_the_pass(monkeypatch, model, backend, bug):
    monkeypatch.setattr(passes, "JOINT", (bug, *passes.JOINT))
    with pytest.raises(graphopt.GraphoptError, match=bug.__name__):
        torch.compile(model, backend=backend)(torch.randn(4, 8))


def test_the_error_names_the_node_and_the_line(monkeypatch, model):
    monkeypatch.setattr(passes, "JOINT", (crashes,))

    def forward(x):
        return model(x)

    with pytest.raises(graphopt.PassError) as error:
        torch.compile(forward, backend="lowmem_eager")(torch.randn(4, 8))
    assert "native_layer_norm" in str(error.value) and "test_pipeline.py" in str(error.value)
    assert "KeyError" in str(error.value)


def test_a_bug_in_canonicalize_is_no_silent_eager(monkeypatch, model):
    def bug(gm, example_inputs):
        raise RuntimeError

    monkeypatch.setattr(passes, "FORWARD", (bug,))
    with pytest.raises(graphopt.PassError, match="bug"):
        torch.compile(model, backend="lowmem_eager")(torch.randn(4, 8))


@pytest.mark.parametrize("name, option", [("share_norm", "'share_norm'"), ("plan", "'encode'"), ("lower", None)])
def test_the_error_says_how_to_leave_the_pass_out_where_that_is_possible(name, option):
    with pytest.raises(graphopt.PassError) as error, blamed(name, fx.symbolic_trace(nn.Identity())):
        raise KeyError
    assert (f"the option 'disable' of {option} leaves it out" if option else "not in the model.") in str(error.value)


@pytest.mark.parametrize("name", passes.NAMES)
def test_a_pass_can_be_switched_off_by_name(model, name):
    options = graphopt.Options(approx_activation="relu3", disable=(name,))
    _, records, _ = graphopt.capture(model, torch.randn(40, 8)).lowmem(options)
    assert name not in {record.name for record in records}
    assert {record.name for record in records} >= set(passes.NAMES) - {name}


def test_the_record_tells_what_happened(model):
    _, records, _ = graphopt.capture(model, torch.randn(400, 8)).lowmem(graphopt.Options("exact"))
    record = {each.name: each for each in records}
    assert record["share_norm"].fired[0].module == "1"
    assert record["share_norm"].nodes_added and record["share_norm"].nodes_removed
    assert record["pack_mask"].bytes_after < record["pack_mask"].bytes_before
    assert all(each.seconds > 0 for each in records)


def test_passes_stand_alone_in_another_compiler(model):
    capture = graphopt.capture(model, torch.randn(40, 8))
    one = passes.share_norm(capture.rewritten()[0], capture.example_inputs)
    other = graphopt.apply(capture.rewritten()[0], capture.example_inputs, passes=[passes.share_norm])
    assert [node.target for node in one.graph.nodes] == [node.target for node in other.graph.nodes]
    assert sum(each.bytes for each in capture.cut(one)) <= sum(each.bytes for each in capture.saved)


def test_node_names_hold_from_run_to_run(model):
    names = [[node.name for node in graphopt.capture(model, torch.randn(40, 8)).rewritten(*passes.JOINT)[0].graph.nodes]
             for _ in range(2)]  # fmt: skip
    assert names[0] == names[1]
