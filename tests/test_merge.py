"""merge_norm_affine computes the same function, takes back what it did, and changes nothing where it refuses."""

import ast
import copy
import io
import math
import pickle

import models
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from versions import COPIES_CONFIGS

import graphopt
from graphopt import MergeError, merge_norm_affine, unmerge_norm_affine

WIDTH, OUT, ROWS = 16, 24, 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Net(nn.Module):
    """Modules by name, and a forward of them: forward(net, x)."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        self.how = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor):
        return self.how(self, x)


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, dropout: float | None = None) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Identity() if dropout is None else nn.Dropout(dropout)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x)))


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class NamedLinear(nn.Linear):
    pass


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-8, 8, (OUT, WIDTH), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(OUT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def random(module: nn.Module) -> nn.Module:
    """Magnitudes of 0.5 to 2 for norms and 0.1 to 1 for linears: far from zero, where float16 is subnormal."""
    with torch.no_grad():
        for each in module.parameters():
            if each.is_floating_point():
                low, high = (0.5, 2.0) if each.dim() == 1 else (0.1, 1.0)
                each.copy_(torch.empty_like(each).uniform_(low, high) * torch.where(torch.rand_like(each) < 0.5, -1, 1))
    return module


def net(forward=lambda net, x: net.linear(net.norm(x)), **modules: nn.Module) -> Net:
    return random(Net(forward, **({"norm": nn.LayerNorm(WIDTH), "linear": nn.Linear(WIDTH, OUT)} | modules)))


def chain() -> nn.Module:
    """LayerNorm before a linear without a bias, RMSNorm before one with a bias."""
    return random(
        nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, OUT, bias=False), nn.GELU(),
            nn.RMSNorm(OUT, eps=1e-6), nn.Linear(OUT, WIDTH),
        )
    )  # fmt: skip


def rows(width: int = WIDTH, **kwargs) -> Tensor:
    return torch.randn(ROWS, width, **kwargs)


def snapshot(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {
        name: (each.detach().clone(), each.requires_grad)
        for name, each in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    }


def unchanged(model: nn.Module, before: dict[str, tuple[Tensor, bool]]) -> bool:
    now = snapshot(model)
    return now.keys() == before.keys() and all(
        requires_grad == now[name][1] and (each.is_meta or torch.equal(each, now[name][0]))
        for name, (each, requires_grad) in before.items()
    )


def suggested(error: MergeError) -> list[str]:
    return ast.literal_eval(str(error).rpartition("exclude=")[2])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[COPIES_CONFIGS] if name == "t5" else []) for name in models.MODELS]
)
def test_transformers_compute_the_same_with_the_exclude_that_the_error_gives(name):
    model, inputs = models.build(name)
    model.eval()
    before = snapshot(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    exclude: list[str] = []
    try:
        merge_norm_affine(model, **inputs)
    except MergeError as error:
        assert unchanged(model, before)
        exclude = suggested(error)
        merge_norm_affine(model, exclude=exclude, **inputs)
    merged = {norm.path: norm for norm in model.merged_norms}
    assert merged and not merged.keys() & set(exclude)
    for path, norm in merged.items():
        assert (model.get_submodule(path).weight == (0 if name == "gemma3" else 1)).all()
        for linear in norm.linears:
            assert not torch.equal(model.get_parameter(f"{linear.path}.weight"), before[f"{linear.path}.weight"][0])
    for path in exclude:
        assert torch.equal(model.get_submodule(path).weight, before[f"{path}.weight"][0])
    # a linear over n = 88 or fewer features is off by (n + 4) 2^-23 = 1e-5 of the sum of its terms' magnitudes; the few
    # linears of two layers and cancelling terms leave ten times that. A forgotten weight or bias is off by 1e-1
    with torch.no_grad():
        assert (model(**inputs).logits - expected).abs().max() < 1e-4 * expected.abs().max()
        unmerge_norm_affine(model)
        assert (model(**inputs).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert snapshot(model).keys() == before.keys()


def test_gpt2_needs_no_inputs_and_only_its_last_norm_stays():
    model, _ = models.build("gpt2")
    with pytest.raises(MergeError, match=r"'transformer.wte.weight', 'lm_head.weight' share their memory") as error:
        merge_norm_affine(model)
    assert suggested(error.value) == ["transformer.ln_f"]
    merge_norm_affine(model, exclude="transformer.ln_f")
    assert all(linear.transposed for norm in model.merged_norms for linear in norm.linears)
    assert [len(norm.linears) for norm in model.merged_norms] == [1, 1, 1, 1]


def test_post_norm_bert_refuses_every_norm():
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=16)  # fmt: skip
    model = transformers.BertModel(config)
    before = snapshot(model)
    with pytest.raises(MergeError, match="5 norms cannot be merged") as error:
        merge_norm_affine(model)
    assert set(suggested(error.value)) == {
        name for name, each in model.named_modules() if isinstance(each, nn.LayerNorm)
    }
    assert "its output is read by add in 'encoder.layer.0.output'" in str(error.value)
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", (nn.LayerNorm, nn.RMSNorm))
@pytest.mark.parametrize("linear", (nn.Linear, Conv1D))
def test_a_merged_linear_is_off_by_its_rounding(linear, norm, dtype):
    made = nn.Linear(WIDTH, OUT) if linear is nn.Linear else Conv1D(OUT, WIDTH)
    model = net(norm=norm(WIDTH), linear=made).to(dtype)
    x = rows(dtype=dtype)
    weight, shift = model.linear.weight.detach().double(), model.linear.bias.detach().double()
    weight = weight.T if linear is Conv1D else weight
    gamma = model.norm.weight.detach().double()
    beta = model.norm.bias.detach().double() if norm is nn.LayerNorm else torch.zeros(WIDTH, dtype=torch.float64)
    merge_norm_affine(model, x)
    with torch.no_grad():
        z, found = model.norm(x).double(), model(x).double()
    expected = (z * gamma + beta) @ weight.T + shift
    # half an ulp of dtype for W', b' and o each; the sum is in float32 or wider: n + 2 roundings of 2^-24
    unit, magnitude = torch.finfo(dtype).eps / 2, z.abs() @ (weight * gamma).abs().T + (shift + weight @ beta).abs()
    assert (
        (found - expected).abs() <= 1.01 * (unit * (magnitude + expected.abs()) + (WIDTH + 2) * 2**-24 * magnitude)
    ).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("linear", (nn.Linear, Conv1D))
def test_a_round_trip_is_off_by_one_ulp(linear, dtype):
    model = net(linear=nn.Linear(WIDTH, OUT) if linear is nn.Linear else Conv1D(OUT, WIDTH)).to(dtype)
    model.norm.bias.requires_grad_(False)
    model.linear.weight.requires_grad_(False)
    before, names = snapshot(model), dict(model.named_parameters())
    merge_norm_affine(model, rows(dtype=dtype))
    assert not model.norm.weight.requires_grad and model.linear.bias.requires_grad
    assert not model.linear.weight.requires_grad
    unmerge_norm_affine(model)
    after = snapshot(model)
    assert after.keys() == before.keys() and dict(model.named_parameters()).items() == names.items()
    assert all(after[name][1] == before[name][1] for name in before)
    assert all(torch.equal(after[name][0], before[name][0]) for name in ("norm.weight", "norm.bias"))
    weight, new = before["linear.weight"][0], after["linear.weight"][0]
    # W'/weight lies less than an ulp from W, and rounding moves it by half a one
    assert (new.view(INTEGER[dtype]) - weight.view(INTEGER[dtype])).abs().max() <= 1
    # a rounding of b' and one of b, and two of every element of W
    eps, beta = torch.finfo(dtype).eps, before["norm.bias"][0].double()
    wide, bias = (weight.T if linear is Conv1D else weight).double(), before["linear.bias"][0].double()
    bound = eps / 2 * ((bias + wide @ beta).abs() + bias.abs()) + 1.5 * eps * wide.abs() @ beta.abs()
    assert ((after["linear.bias"][0].double() - bias).abs() <= bound).all()


def tied() -> Net:
    made = net(lambda net, x: net.linear(net.norm(x)) + net.other(x), other=nn.Linear(WIDTH, OUT))
    made.other.weight = made.linear.weight
    return made


def sharing_storage() -> Net:
    made = net(other=nn.Linear(WIDTH, OUT))
    made.other.weight = nn.Parameter(made.linear.weight.detach()[2:])
    return made


def with_weight(value: float, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Net:
    made = net().to(dtype)
    with torch.no_grad():
        made.norm.weight[0] = value
        made.linear.weight *= scale
    return made


def parametrized(tensor: str) -> Net:
    made = net()
    parametrize.register_parametrization(getattr(made, tensor), "weight", Same())
    return made


def weight_normalised() -> Net:
    made = net()
    parametrizations.weight_norm(made.linear)
    return made


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, OUT, norm_first=True, batch_first=True)


def attention(net: Net, x: Tensor) -> Tensor:
    y = net.norm(x)[None]
    return net.linear(F.scaled_dot_product_attention(y, y, y)[0])


REFUSED = {
    "tied": (tied, "'linear.weight', 'other.weight' share their memory"),
    "storage": (sharing_storage, "'linear.weight', 'other.weight' share their memory"),
    "shared norm": (
        lambda: net(lambda net, x: net.linear(net.norm(x)) + net.other(net.norm(2 * x)), other=nn.Linear(WIDTH, OUT)),
        "'norm': more than one norm of the graph reads its parameters",
    ),
    "norm's weight": (lambda: net(lambda net, x: net.linear(net.norm(x)) + net.norm.weight.sum()), "also read by sum"),
    "residual": (
        lambda: net(lambda net, x: net.linear(y := net.norm(x)) + y, linear=nn.Linear(WIDTH, WIDTH)), "read by add",
    ),
    "output": (lambda: net(lambda net, x: (y := net.norm(x), net.linear(y))), "is returned by the model"),
    "dropout": (lambda: net(lambda net, x: net.linear(F.dropout(net.norm(x), 0.1))), "read by dropout"),
    "attention": (lambda: net(attention), "read by scaled_dot_product_attention"),
    "flipped": (lambda: net(lambda net, x: net.linear(net.norm(x).flip(-1))), "read by flip"),
    "indexed": (lambda: net(lambda net, x: net.linear(net.norm(x)[:1, [*range(1, WIDTH), 0]])), "read by getitem"),
    "turned": (
        lambda: net(lambda net, x: net.linear(net.norm(x[None].expand(WIDTH, -1, -1)).transpose(0, 2))),
        "read by transpose",
    ),
    "flattened": (
        lambda: net(lambda net, x: net.linear(net.norm(x.view(ROWS, 4, 4)).flatten(1)), norm=nn.LayerNorm((4, 4))),
        "over 2 dims",
    ),
    "linear elsewhere": (lambda: net(lambda net, x: net.linear(net.norm(x)) + net.linear(x)), "also read by linear"),
    "linear twice": (lambda: net(lambda net, x: net.linear(y := net.norm(x)) + net.linear(y)), "also read by linear"),
    "weight": (lambda: net(lambda net, x: F.linear(net.linear.weight, net.norm(x))), "as another than the input"),
    "zeros": (lambda: with_weight(0.0), "it multiplies 1 of 16 features by zero"),
    "not finite": (lambda: with_weight(math.inf), "is not finite"),
    "underflow": (lambda: with_weight(1e-6, torch.float16), "out of the range of float16"),
    "overflow": (lambda: with_weight(6e4, torch.float16, 10.0), "out of the range of float16"),
    "quantised": (lambda: net(linear=Quantised(), norm=nn.RMSNorm(WIDTH)), "is int8: quantised"),
    "meta": (lambda: net().to("meta"), "is on the meta device"),
    "weight norm": (weight_normalised, "is no parameter of the model, but computed"),
    "parametrized": (lambda: parametrized("linear"), "the weight of the linear in 'linear' is parametrized"),
    "buffer": (lambda: net(linear=Buffered()), "is no parameter of the model"),
    "own forward": (lambda: net(linear=OwnForward(WIDTH, OUT, bias=False)), "has none and cannot be given one"),
    "called from outside": (
        lambda: net(lambda net, x: F.linear(net.norm(x), net.linear.weight), linear=nn.Linear(WIDTH, OUT, bias=False)),
        "has none and cannot be given one",
    ),
    "LoRA dropout": (lambda: net(linear=LoRA(nn.Linear(WIDTH, OUT), 0.1)), "read by dropout"),
    "unseen": (lambda: net(spare=nn.LayerNorm(WIDTH)), "'spare': the graph of these inputs does not show it"),
    "fused": (
        lambda: Net(lambda net, x: net.layer(x[None]), layer=encoder_layer()).eval().requires_grad_(False),
        "'layer.norm1': the graph of these inputs does not show it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_norm_and_changes_nothing(case):
    build, reason = REFUSED[case]
    model = build()
    parameter = next(model.parameters())
    x = rows(device=parameter.device, dtype=parameter.dtype if parameter.is_floating_point() else None)
    before = snapshot(model)
    with pytest.raises(MergeError, match="cannot be merged") as error:
        merge_norm_affine(model, x)
    assert reason in str(error.value)
    assert all(name in dict(model.named_modules()) for name in suggested(error.value))
    assert unchanged(model, before) and not hasattr(model, "merged_norms")
    merge_norm_affine(model, x, exclude=suggested(error.value))


def test_a_parametrized_norm_is_refused_by_its_own_name():
    model = parametrized("norm")
    with pytest.raises(MergeError, match="its weight is parametrized"):
        merge_norm_affine(model, rows())


def test_checkpointed_regions_are_refused():
    model = net(lambda net, x: checkpoint(lambda x: net.linear(net.norm(x)), x, use_reentrant=False))
    before = snapshot(model)
    with pytest.raises(MergeError, match="turn activation checkpointing off"):
        merge_norm_affine(model, rows())
    assert unchanged(model, before)


def test_merging_twice_is_refused():
    model = merge_norm_affine(net(), rows())
    before = snapshot(model)
    for again in (model, nn.Sequential(model)):
        with pytest.raises(MergeError, match="this model's norms are merged already; unmerge_norm_affine"):
            merge_norm_affine(again, rows())
    assert unchanged(model, before)


def test_what_is_not_merged_cannot_be_taken_out():
    with pytest.raises(MergeError, match="no norm of this model is merged"):
        unmerge_norm_affine(net())
    model = merge_norm_affine(net(), rows())
    model.linear = LoRA(model.linear)
    before = snapshot(model)
    with pytest.raises(MergeError, match="'linear' has no parameter 'weight' any more"):
        unmerge_norm_affine(model)
    assert unchanged(model, before)


def test_an_excluded_norm_and_its_linears_stay_bit_for_bit():
    model = chain()
    before = snapshot(model)
    merge_norm_affine(model, rows(), exclude=["4"])
    after = snapshot(model)
    assert all(torch.equal(after[name][0], before[name][0]) for name in before if name[0] in "045")
    assert not torch.equal(after["2.weight"][0], before["2.weight"][0])


def test_an_unknown_exclude_names_the_nearest():
    with pytest.raises(MergeError, match=r"'nrom' is no norm of this model; the nearest is 'norm'"):
        merge_norm_affine(net(), rows(), exclude=["nrom"])


def test_without_inputs_the_error_asks_for_them():
    vit, inputs = models.build("vit")
    for model in (net(), vit):
        with pytest.raises(MergeError, match="pass the inputs of one call"):
            merge_norm_affine(model)
    merge_norm_affine(vit, **inputs)


def test_norms_without_parameters_are_left_alone():
    model = net(norm=nn.LayerNorm(WIDTH, elementwise_affine=False))
    before = snapshot(model)
    for exclude in ((), ["norm"]):
        assert merge_norm_affine(model, rows(), exclude=exclude) is model
        assert unchanged(model, before)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.linear(net.norm(x).view(2, -1, WIDTH).transpose(0, 1).contiguous()[1:, :1].squeeze(1)),
        lambda net, x: net.linear(net.norm(x)[None, :, None].expand(3, -1, 2, -1).flatten(0, 2).to(torch.float64)),
        lambda net, x: torch.addmm(net.linear.bias, net.norm(x).permute(0, 1), net.linear.weight),
    ],
)  # fmt: skip
def test_views_and_casts_that_keep_features_are_followed(forward):
    model = net(forward, linear=Conv1D(OUT, WIDTH) if "addmm" in forward.__code__.co_names else nn.Linear(WIDTH, OUT))
    if "float64" in forward.__code__.co_names:
        model.linear.double()
    x = rows()
    expected = model(x).detach()
    merge_norm_affine(model, x)
    # 16 + 4 roundings of 2^-23 of a sum of 16 terms below 1 * 4 * 4 in magnitude
    assert (model(x) - expected).abs().max() < 20 * 2**-23 * 16 * 16


SETTINGS = {
    "eval": lambda model: model.eval(),
    "frozen": lambda model: model.requires_grad_(False),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "LoRA": lambda model: setattr(model, "2", LoRA(model[2])) or model,
    "subclass": lambda model: setattr(model, "2", NamedLinear(WIDTH, OUT, bias=False)) or model,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad))
def test_any_model_that_training_takes_is_merged_in_place(setting, mode):
    model = SETTINGS[setting](chain()).double()
    x = rows(dtype=torch.float64)
    parameters = {name: (each, each.requires_grad) for name, each in model.named_parameters()}
    expected = model(x).detach()
    with mode():
        assert merge_norm_affine(model, x) is model
    now = dict(model.named_parameters())
    assert all(now[name] is each for name, (each, _) in parameters.items())
    norms = {name for name in parameters if f"{name.rpartition('.')[0]}.merged_weight" in dict(model.named_buffers())}
    assert len(norms) == 3 and not any(now[name].requires_grad for name in norms)
    assert all(now[name].requires_grad == grad for name, (_, grad) in parameters.items() if name not in norms)
    # (24 + 4) 2^-52 = 6e-15 for each of three linears, of sums a hundred times their result
    assert (model(x) - expected).abs().max() < 1e-11 * expected.abs().max()
    unmerge_norm_affine(model)
    assert (model(x) - expected).abs().max() < 1e-11 * expected.abs().max()
    assert dict(model.named_parameters()).keys() == parameters.keys()


def test_a_linear_without_a_bias_gets_a_frozen_one_and_gives_it_back():
    model = chain()
    beta, weight = model[1].bias.detach().clone(), model[2].weight.detach().clone()
    merge_norm_affine(model, rows())
    assert torch.equal(model[2].bias, (weight.double() @ beta.double()).float()) and not model[2].bias.requires_grad
    unmerge_norm_affine(model)
    assert model[2].bias is None and "2.bias" not in model.state_dict()


def test_a_zero_bias_asks_no_bias_of_a_linear_that_cannot_have_one():
    model = net(linear=OwnForward(WIDTH, OUT, bias=False))
    nn.init.zeros_(model.norm.bias)
    x = rows()
    expected = model(x).detach()
    merge_norm_affine(model, x)
    # 16 + 4 roundings of 2^-23 of a sum of 16 terms below 1 * 2 * 4 in magnitude
    assert model.linear.bias is None and (model(x) - expected).abs().max() < 20 * 2**-23 * 16 * 8


def train(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("norms_too", (False, True))
def test_unmerging_after_training_computes_the_same(norms_too):
    model, x = chain().double(), rows(dtype=torch.float64)
    merge_norm_affine(model, x)
    start = model(x).detach()
    model.requires_grad_(True) if norms_too else None
    train(model, x)
    trained = model(x).detach()
    merged = [model[1].weight.detach().clone(), model[4].weight.detach().clone()]
    assert (trained - start).abs().max() > 1e-3 * start.abs().max()
    assert all((weight == 1).all() != norms_too for weight in merged)
    unmerge_norm_affine(model)
    # as above: 6e-15 for each linear, of sums a hundred times their result
    assert (model(x) - trained).abs().max() < 1e-11 * trained.abs().max()
    assert "merged_norms" not in vars(model) and not list(model.buffers())


def test_a_norm_left_with_a_gradient_takes_no_further_step():
    model, x = chain(), rows()
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    merge_norm_affine(model, x)
    optimizer.step()
    assert (model[1].weight == 1).all() and (model[1].bias == 0).all()


def test_a_merged_checkpoint_loads_into_a_fresh_model_that_was_merged():
    x = rows()
    model = merge_norm_affine(chain(), x)
    train(model, x)
    fresh = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, OUT, bias=False), nn.GELU(),
        nn.RMSNorm(OUT, eps=1e-6), nn.Linear(OUT, WIDTH),
    )  # fmt: skip
    merge_norm_affine(fresh, x)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    for each in (fresh, model):
        unmerge_norm_affine(each)
    assert all(torch.equal(each, fresh.state_dict()[name]) for name, each in model.state_dict().items())
    assert torch.equal(fresh(x), model(x))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved))
def test_a_copy_of_a_merged_model_can_be_unmerged(again):
    x = rows()
    model = merge_norm_affine(chain(), x)
    other = unmerge_norm_affine(again(model))
    assert "merged_norms" in vars(model)
    unmerge_norm_affine(model)
    assert all(torch.equal(each, other.state_dict()[name]) for name, each in model.state_dict().items())


def test_a_merged_part_can_be_unmerged_from_the_whole():
    model, x = chain(), rows()
    before = model(x).detach()
    whole = nn.Sequential(merge_norm_affine(model, x).to(torch.float64).float(), nn.Identity())
    unmerge_norm_affine(whole)
    # 28 roundings of 2^-23 for each of three linears, of sums a hundred times their result
    assert (whole(x) - before).abs().max() < 1e-3 * before.abs().max()


def test_lowmem_gives_a_merged_model_the_same_gradients():
    model = merge_norm_affine(chain(), rows())
    x = rows()
    model(x).sum().backward()
    expected = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    model.zero_grad()
    torch.compile(model, backend="lowmem_eager", options={"preset": "exact"})(x).sum().backward()
    found = [each.grad for each in model.parameters() if each.grad is not None]
    assert len(found) == len(expected) == 5
    # 28 roundings of 2^-23 in each of three linears' backward, of sums a hundred times their result
    assert all((left - right).abs().max() < 1e-3 * right.abs().max() for left, right in zip(found, expected))


def test_public_names_are_there():
    assert {"merge_norm_affine", "unmerge_norm_affine", "MergeError"} <= set(graphopt.__all__)


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(48, 8)

    def forward(self, x):
        return self.linear(self.norm(x).view(2, -1))


def expanded() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
    model[0].weight = nn.Parameter(torch.full((1,), 2.0).expand(16))
    return model


def inference() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
    with torch.inference_mode():
        model[0].weight = nn.Parameter(torch.full((16,), 2.0), requires_grad=False)
    return model


def named() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
    model[0].merged_bias = 1
    return model


@pytest.mark.parametrize("build", [Flattened, expanded, inference, named])
def test_what_torch_would_stop_half_way_is_refused_first(build):
    model = build()
    before = {name: each.clone() for name, each in model.named_parameters()}
    with pytest.raises(graphopt.MergeError, match="exclude="):
        graphopt.merge_norm_affine(model, torch.randn(2, 3, 16))
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    graphopt.merge_norm_affine(model, torch.randn(2, 3, 16), exclude=["norm" if build is Flattened else "0"])
