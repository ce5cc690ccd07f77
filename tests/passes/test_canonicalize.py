"""canonicalize: what is written out becomes one op with the same values; what only looks like it is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers import activations
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from graphopt.passes.canonicalize import canonicalize
from graphopt.pipeline import PassRecord, run

D = 8


class Recorder:
    """A backend that keeps the operations before and after the pass, and the pass's record."""

    def __init__(self) -> None:
        self.before: list[str] = []
        self.after: list[str] = []
        self.records: list[PassRecord] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.before += operations(gm)
        gm, records = run(gm, example_inputs, (canonicalize,))
        self.after += operations(gm)
        self.records += records
        return gm.forward

    @property
    def fired(self) -> list[str]:
        return [event.text for record in self.records for event in record.fired]

    @property
    def left(self) -> list[str]:
        return [event.text for record in self.records for event in record.left_alone]


def operations(gm: fx.GraphModule) -> list[str]:
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    return [str(node.target if isinstance(node.target, str) else node.target.__name__) for node in calls]


def compiled(function: Callable[..., Any], **settings: Any) -> tuple[Callable[..., Any], Recorder]:
    torch._dynamo.reset()
    recorder = Recorder()
    return torch.compile(function, backend=recorder, fullgraph=True, **settings), recorder


class Formula(nn.Module):
    """A formula of x, and of a weight and a bias where it takes them."""

    def __init__(self, formula: Callable[..., Tensor], parameters: int = 0) -> None:
        super().__init__()
        self.formula = formula
        self.parts = nn.ParameterList(nn.Parameter(torch.ones(D)) for _ in range(parameters))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, *self.parts)


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def layer_norm_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    m = x.mean(-1, keepdim=True)
    v = (x - m).pow(2).mean(dim=-1, keepdim=True)
    return w * (x - m) / torch.sqrt(v + 1e-5) + b


def layer_norm_var(x: Tensor, w: Tensor) -> Tensor:
    v = x.var(dim=[-1], unbiased=False, keepdim=True)
    return w * ((x - torch.mean(x, -1, True)) * torch.rsqrt(v + 1e-5))


def layer_norm_plain(x: Tensor) -> Tensor:
    return (x - mean(x)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def layer_norm_float(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    centred = h - mean(h)
    return (b + centred * (mean(centred * centred) + 1e-5) ** -0.5 * w).type_as(x)


def tanh_gelu_distributed(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * x + 0.044715 * 0.7978845608 * x * x * x))


def t5_layer_norm() -> nn.Module:
    return T5LayerNorm(D)


NORMS = [
    ("LlamaRMSNorm", lambda: LlamaRMSNorm(D), "rms_norm.default"),
    ("Qwen3RMSNorm", lambda: Qwen3RMSNorm(D), "rms_norm.default"),
    ("Gemma3RMSNorm", lambda: Gemma3RMSNorm(D), "rms_norm.default"),
    ("T5LayerNorm", t5_layer_norm, "rms_norm.default"),
    ("nn.RMSNorm", lambda: nn.RMSNorm(D), "rms_norm.default"),
    ("nn.RMSNorm eps", lambda: nn.RMSNorm(D, eps=1e-3), "rms_norm.default"),
    ("F.rms_norm", lambda: Formula(lambda x: F.rms_norm(x, (D,))), "rms_norm.default"),
    ("rms sqrt", lambda: Formula(lambda x: x / torch.sqrt(mean(x.square()) + 1e-6)), "rms_norm.default"),
    ("rms power", lambda: Formula(lambda x, w: w * x * (mean(x * x) + 1e-6) ** -0.5, 1), "rms_norm.default"),
    ("layer norm mean", lambda: Formula(layer_norm_mean, 2), "layer_norm"),
    ("layer norm var", lambda: Formula(layer_norm_var, 1), "layer_norm"),
    ("layer norm float", lambda: Formula(layer_norm_float, 2), "layer_norm"),
    ("layer norm plain", lambda: Formula(layer_norm_plain), "layer_norm"),
]  # fmt: skip
ACTIVATIONS = [
    ("NewGELUActivation", activations.NewGELUActivation, "gelu"),
    ("FastGELUActivation", activations.FastGELUActivation, "gelu"),
    ("AccurateGELUActivation", activations.AccurateGELUActivation, "gelu"),
    ("GELUTanh", lambda: activations.GELUTanh(use_gelu_tanh_python=True), "gelu"),
    ("GELUActivation", lambda: activations.GELUActivation(use_gelu_python=True), "gelu"),
    ("tanh distributed", lambda: Formula(tanh_gelu_distributed), "gelu"),
    ("QuickGELUActivation", activations.QuickGELUActivation, "silu"),
    ("x * sigmoid(x)", lambda: Formula(lambda x: torch.sigmoid(x) * x), "silu"),
    ("x / (1 + exp(-x))", lambda: Formula(lambda x: x / (1 + torch.exp(-x))), "silu"),
]
MATHS = {"pow", "square", "mean", "var", "rsqrt", "sqrt", "tanh", "erf", "sigmoid", "exp"}


def prepared(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(dtype)


def results(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad.to(y.dtype))]


def assert_close(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    # the op works in float32 and rounds each result once; a scaling around it (quick gelu) rounds three times more, and
    # an error ahead of silu grows by its condition number, below 2 where silu is not tiny: 8 roundings of eps / 2.
    # float32: at most 8 + 6 additions (width, rows) and 18 operations, on terms below 1 + max |result|
    roundings = 4 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == dtype
        bound = roundings * (1 + other.abs().max().item())
        assert (one.double() - other).abs().max().item() <= bound


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


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "Gemma3RMSNorm", "rms power", "layer norm float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_any_shapes_the_weight_gives_the_size_and_dtypes_hold(name: str, dtype: torch.dtype) -> None:
    module = prepared(next(make for other, make, _ in NORMS if other == name), torch.float32)
    gm = canonicalize(fx.symbolic_trace(module))
    assert not MATHS & set(operations(gm))
    x = torch.randn(2, 3, D).to(dtype)
    assert gm(x).dtype == module(x).dtype
    torch.testing.assert_close(gm(x), module(x), rtol=2**-7, atol=2**-7)


def test_without_any_shapes_a_rounding_inside_is_left_alone() -> None:
    module = Formula(lambda x, w: w * (x * torch.rsqrt(mean(x * x) + 1e-6)).to(torch.bfloat16), 1)
    gm, x = fx.symbolic_trace(module), torch.randn(2, D)
    before = operations(gm)
    assert operations(canonicalize(gm)) == before and torch.equal(gm(x), module(x))


def test_leaf_modules_inside_an_idiom_are_read_as_functions() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sigmoid = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.sigmoid(x)

    assert operations(canonicalize(fx.symbolic_trace(Swish()))) == ["silu"]


NEAR = {
    "unbiased variance": lambda x, w: (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * w,
    "eps outside": lambda x, w: (x - mean(x)) / (x.var(-1, keepdim=True, unbiased=False).sqrt() + 1e-5) * w,
    "another dim": lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w,
    "sum": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * w,
    "another tensor's mean": lambda x, w: x * torch.rsqrt((x + w).pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "third power": lambda x, w: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6) * w,
    "not centred": lambda x, w: x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w,
    "gelu constant": lambda x, w: 0.5 * x * (1 + torch.tanh(0.798 * (x + 0.044715 * x**3))),
    "gelu half": lambda x, w: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "erf of x": lambda x, w: 0.5 * x * (1 + torch.erf(x)),
    "sigmoid of another": lambda x, w: x * torch.sigmoid(w),
    "quick constant": lambda x, w: x * torch.sigmoid(1.7 * x),
    "narrow inside": lambda x, w: x * torch.rsqrt(x.bfloat16().pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "rounded inside": lambda x, w: x * torch.rsqrt(mean(x.pow(2).bfloat16()) + 1e-6) * w,
}


def test_a_rounding_inside_stays_and_the_formula_before_it_is_replaced() -> None:
    def formula(x: Tensor, w: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).half() * w

    x, w = torch.randn(2, 3, D), torch.randn(D)
    function, recorder = compiled(formula)
    torch.testing.assert_close(function(x, w), formula(x, w), rtol=2**-10, atol=0)
    assert recorder.after == ["rms_norm.default", "getitem", "to", "mul"]


def extra_reader(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rstd * w, rstd


def changed_in_place(x: Tensor, w: Tensor) -> Tensor:
    h = x * 2
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    h.add_(1)
    return h * rstd * w


def statistics_without_grad(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rstd * w


LEFT = {
    "extra reader": (extra_reader, "another reader"),
    "in place": (changed_in_place, "changes a tensor or a mode"),
    "no grad inside": (statistics_without_grad, "changes a tensor or a mode"),
    "unbiased variance": (NEAR["unbiased variance"], "unbiased"),
    "another dim": (NEAR["another dim"], "over the last dims"),
    "rounded inside": (NEAR["rounded inside"], "on purpose"),
}


@pytest.mark.parametrize("formula", [*NEAR.values(), extra_reader, changed_in_place, statistics_without_grad])
def test_what_only_looks_like_an_idiom_is_left_alone(formula: Callable[..., Any]) -> None:
    x, w = torch.randn(2, 3, D), torch.randn(D)
    function, recorder = compiled(formula)
    torch.testing.assert_close(function(x, w), formula(x, w), rtol=0, atol=0)
    assert recorder.before == recorder.after and not recorder.fired


@pytest.mark.parametrize(("formula", "reason"), LEFT.values(), ids=LEFT.keys())
def test_a_near_miss_is_reported_once_with_its_reason(formula: Callable[..., Any], reason: str) -> None:
    function, recorder = compiled(formula)
    function(torch.randn(2, 3, D), torch.randn(D))
    assert len(recorder.left) == 1 and reason in recorder.left[0]


@pytest.mark.parametrize(("make", "op"), [pytest.param(m, op, id=name) for name, m, op in NORMS])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_dtype_is_the_formulas_own(make: Any, op: str, dtypes: Any, autocast: bool) -> None:
    module, x = prepared(make, dtypes[1]), torch.randn(2, 3, D).to(dtypes[0])
    function, recorder = compiled(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted, got = module(x), function(x)
    assert op in recorder.after and got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64], ids=str)
def test_other_dtypes_keep_their_values(dtype: torch.dtype) -> None:
    def formula(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    x = torch.arange(1, 9).to(dtype)
    torch.testing.assert_close(compiled(formula)[0](x), formula(x))


def test_a_float64_input_cast_to_float32_is_left_alone() -> None:
    module, x = LlamaRMSNorm(D).double(), torch.randn(2, 3, D, dtype=torch.float64)
    function, recorder = compiled(module)
    assert torch.equal(function(x), module(x)) and not recorder.fired


def test_quick_gelu_holds_at_the_end_of_float16() -> None:
    x = torch.tensor([-65504.0, -1.0, 40000.0, 65504.0], dtype=torch.float16)
    module = activations.QuickGELUActivation()
    torch.testing.assert_close(compiled(module)[0](x), module(x), rtol=2**-9, atol=0)


def test_dynamic_shapes_and_a_changed_eps() -> None:
    module = LlamaRMSNorm(D)
    function, recorder = compiled(module, dynamic=True)
    for rows, eps in ((3, 1e-6), (5, 1e-6), (5, 0.5)):
        module.variance_epsilon, x = eps, torch.randn(2, rows, D)
        torch.testing.assert_close(function(x), module(x))
    assert len(recorder.fired) == len(recorder.records) == 2


def test_an_eps_read_off_a_tensor_is_left_alone() -> None:
    def formula(x: Tensor, eps: Tensor) -> Tensor:
        return x * torch.rsqrt(mean(x * x) + eps.item())

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        function, recorder = compiled(formula)
        x, eps = torch.randn(2, D), torch.tensor(1e-3)
        torch.testing.assert_close(function(x, eps), formula(x, eps))
    assert recorder.before == recorder.after and "read off a tensor" in recorder.left[0]


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
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert len(recorder.fired) == count and not recorder.left
    assert not {"rsqrt", "tanh", "pow"} & set(recorder.after)
