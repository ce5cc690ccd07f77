"""Real transformers, one training step each: gradients of eager, fewer saved bytes than stock, no norm left out."""

import pytest
import torch
from models import MODELS, build, loss
from training import EXACT, distance

import graphopt
from graphopt.tracer import Capture

# norms whose output goes into a residual sum or a rotary embedding
FEEDS_NO_LINEAR = {
    "gemma3": ("q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm"),
}


def gradients(model, inputs):
    model.zero_grad()
    loss(model, inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def captured(model, inputs) -> Capture:
    more = {"use_cache": False} if "use_cache" in model.config.__dict__ else {}
    return graphopt.capture(model, **inputs, **more)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_has_eager_gradients_and_saves_less(name):
    model, inputs = build(name)
    expected = gradients(model, inputs)
    compiled = torch.compile(model, backend="lowmem_eager", dynamic=False, options=EXACT)
    assert distance(gradients(compiled, inputs), {f"_orig_mod.{k}": g for k, g in expected.items()}) < 1e-4

    capture = captured(model, inputs)
    saved, records, _ = capture.lowmem(graphopt.Options("exact"))
    assert sum(each.bytes for each in saved) < 0.8 * sum(each.bytes for each in capture.saved)

    norms = {path for path, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    norms = {path for path in norms if not path.endswith(FEEDS_NO_LINEAR.get(name, ("no such",)))}
    fired = {event.module for record in records if record.name == "share_norm" for event in record.fired}
    assert norms and norms <= fired
