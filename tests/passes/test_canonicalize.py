"""canonicalize: what is written out becomes one op with the same values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import ACTIVATIONS, MATHS, NORMS, D, prepared, rounding, t5_layer_norm
from recorder import compiled, operations
from torch import Tensor, fx, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from graphopt.passes import canonicalize


def results(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad.to(y.dtype))]


def assert_close(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    # a scaling around the op (quick gelu) rounds three times more, and an error ahead of silu grows by its condition
    # number, below 2 where silu is not tiny: 8 roundings in all
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max().item() <= rounding(dtype, 8, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("make", "op"), [pytest.param(m, op, id=name) for name, m, op in NORMS + ACTIVATIONS])
def test_an_idiom_becomes_one_op_with_its_values_and_gradients(make: Any, op: str, dtype: torch.dtype) -> None:
    module = prepared(make, dtype)
    x, grad = torch.randn(2, 3, D, dtype=dtype), torch.randn(2, 3, D, dtype=dtype)
    function, recorder = compiled(module)
    got = results(module, function, x, grad)
    assert len(recorder.fired) == 1 and not recorder.left
    assert recorder.after.count(op) == 1 and not MATHS & set(recorder.after)
    # float64 knows no narrower cast: formulas that cast to float32 are then right to float32 only
    exact = results(module.double(), module, x.double(), grad.double())
    assert_close(got, exact, dtype)


# T5LayerNorm branches on a dtype, which symbolic_trace refuses
@pytest.mark.parametrize(
    ("make", "op"), [pytest.param(m, op, id=name) for name, m, op in NORMS + ACTIVATIONS if m is not t5_layer_norm]
)
def test_a_symbolically_traced_graph_is_rewritten_too(make: Any, op: str) -> None:
    module, x = prepared(make, torch.float32), torch.randn(2, 3, D)
    gm = canonicalize(fx.symbolic_trace(module), (x,))
    gm.graph.lint()
    assert not MATHS & set(operations(gm)) and op in operations(gm)
    torch.testing.assert_close(gm(x), module(x))


def test_leaf_modules_inside_an_idiom_are_read_as_functions() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sigmoid = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.sigmoid(x)

    assert operations(canonicalize(fx.symbolic_trace(Swish()), (torch.randn(2, D),))) == ["silu"]


def test_dynamic_shapes_and_a_changed_eps() -> None:
    module = LlamaRMSNorm(D)
    function, recorder = compiled(module, dynamic=True)
    for rows, eps in ((3, 1e-6), (5, 1e-6), (5, 0.5)):
        module.variance_epsilon, x = eps, torch.randn(2, rows, D)
        torch.testing.assert_close(function(x), module(x))
    assert len(recorder.fired) == len(recorder.records) == 2


def tiny(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5Model

    ids = torch.arange(1, 15).view(2, 7)
    if name == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)), {"input_ids": ids}
    if name == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16, bos_token_id=1, eos_token_id=2
        )
        return GPT2LMHeadModel(config), {"input_ids": ids}
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    return T5Model(t5), {"input_ids": ids, "decoder_input_ids": ids}


@pytest.mark.parametrize(("name", "count"), [("llama", 5), ("gpt2", 2), ("t5", 12 + 4)])
def test_a_whole_model_keeps_no_written_out_idiom(name: str, count: int) -> None:
    torch.manual_seed(0)
    model, inputs = tiny(name)
    model = model.eval()
    function, recorder = compiled(model)
    got, wanted = function(**inputs, use_cache=False)[0], model(**inputs, use_cache=False)[0]
    # float32: some hundred roundings of 2^-24 through the layers, in sums of either sign, on outputs of order one
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert len(recorder.fired) == count and not recorder.left
    assert not {"rsqrt", "tanh", "pow"} & set(recorder.after)
