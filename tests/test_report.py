"""explain: the report counts what autograd really keeps, names who keeps it, and shows it safely."""

import builtins
import logging
from html.parser import HTMLParser

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training import EXACT

import graphopt
from graphopt import Report
from graphopt.memory import saved_bytes
from graphopt.report.grouping import block_names, name_blocks

WIDTH = 32
VOID = {"meta", "br"}


class LoRA(nn.Module):
    def __init__(self, inner: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


class Block(nn.Module):
    def __init__(self, dropout: float = 0.1, lora: bool = False, autocast: bool = False) -> None:
        super().__init__()
        self.autocast = autocast
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = LoRA(nn.Linear(4 * WIDTH, WIDTH)) if lora else nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm(x)))))


def stack(depth: int = 2, **kwargs) -> nn.Module:
    return nn.Sequential(*(Block(**kwargs) for _ in range(depth)), nn.Linear(WIDTH, 3))


def tokens() -> Tensor:
    return torch.randn(8, 16, WIDTH)


@pytest.fixture(scope="module")
def report():
    return graphopt.explain(stack(), tokens(), preset="exact")


SETTINGS = {"dropout": {}, "plain": {"dropout": 0.0}, "lora": {"lora": True}, "autocast": {"autocast": True}}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("disable", [(), ("share_norm",), ("pack_mask",)], ids=["all", "no share_norm", "no pack_mask"])
def test_bytes_now_are_what_autograd_keeps(settings, disable):
    model, x = stack(**settings), tokens()
    report = graphopt.explain(model, x, options=EXACT | {"disable": disable})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="lowmem_eager", options=EXACT | {"disable": list(disable)})
    kept = saved_bytes(lambda: compiled(x).sum(), [*model.parameters(), x])
    assert report.bytes_now == kept


def test_totals_are_sums_of_rows(report):
    rows = report.tensors()
    assert report.bytes_before == sum(row["bytes_before"] for row in rows) == sum(t.bytes for t in report.before)
    assert report.bytes_now == sum(row["bytes_now"] for row in rows) == sum(t.bytes for t in report.now)
    assert report.fraction == report.bytes_now / report.bytes_before < 1


def test_every_tensor_is_in_one_state(report):
    states = [row["state"] for row in report.tensors()]
    assert states.count("gone") + states.count("kept") == len(report.before)
    assert states.count("new") + states.count("kept") == len(report.now)
    for row in report.tensors():
        assert bool(row["bytes_before"]) == (row["state"] != "new")
        assert bool(row["bytes_now"]) == (row["state"] != "gone")


def test_text_holds_every_module_that_saves(report):
    shown = str(report)
    lines = [line for line in shown.splitlines() if line]
    assert max(map(len, lines)) <= 100
    shown_modules = {line.split()[0] for line in lines}
    names = block_names(report)
    for row in report.tensors():
        assert names[row["module"]] in shown_modules
    assert {"0-1.norm", "0-1.fc1"} & shown_modules
    assert "stock Inductor" in shown and "lowmem" in shown


def test_text_names_every_pass_that_ran(report):
    shown = str(report)
    for record in report.records:
        assert record.name in shown
        for event in (*record.fired, *record.left_alone):
            assert " ".join(event.text.split()[:3]) in shown


def test_what_a_pass_leaves_alone_is_shown_with_its_reason():
    block = Block()

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False).sum()

    report = graphopt.explain(checkpointed, tokens(), preset="exact")
    reasons = {event.text for record in report.records for event in record.left_alone}
    assert any("checkpointed" in reason for reason in reasons)
    shown, page = " ".join(str(report).split()), parsed(report._repr_html_()).text
    assert all(reason in shown and reason in page for reason in reasons)


def test_repeated_blocks_go_by_one_name():
    names = name_blocks((f"layers.{i}.mlp.{j}", j) for i in range(12) for j in (0, 2))
    assert names["layers.7.mlp.2"] == "layers.*.mlp.2"
    names = name_blocks([("net.0", "mm 3"), ("net.1", "gelu"), ("net.2", "mm 3"), ("net.3", "mm 3"), ("", "loss")])
    assert [names[f"net.{i}"] for i in range(4)] == ["net.0,2-3", "net.1", "net.0,2-3", "net.0,2-3"]


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of turn; keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser


def test_html_is_well_formed_and_whole(report, tmp_path):
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for found in (parsed(page), parsed(report._repr_html_())):
        assert not found.seen & {"script", "link", "img"}
        for row in report.tensors():
            assert row["module"] in found.text and row["source"] in found.text


def test_html_escapes_what_the_user_wrote():
    def loss(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w if len("<b>&</b>") < 9 else x).sin().sum()

    html = graphopt.explain(loss, torch.randn(8, 8), torch.randn(8, 8, requires_grad=True))._repr_html_()
    assert "<b>&amp;" not in html and "<b>&<" not in html and "&lt;b&gt;&amp;&lt;/b&gt;" in html
    parsed(html)


def test_plot_is_a_figure_with_every_byte(report):
    from matplotlib.figure import Figure

    figure = report.plot()
    assert isinstance(figure, Figure)
    before, now = ([bar.get_width() for bar in bars] for bars in figure.axes[0].containers)
    # bars are in kB or in MB
    assert sum(now) / sum(before) == pytest.approx(report.fraction)
    figure.canvas.draw()


def test_plot_names_the_extra_to_install(report, monkeypatch):
    found = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"graphopt\[plot\]"):
        report.plot()


def test_a_model_that_saves_nothing():
    report = graphopt.explain(nn.Linear(4, 4), torch.randn(2, 4))
    assert report.bytes_before == report.bytes_now == 0 and report.fraction == 1
    assert "No tensor is saved" in str(report)
    parsed(report._repr_html_())
    report.plot().canvas.draw()


def test_more_saved_than_before_is_said_so(report):
    worse = Report((), report.now, report.records, report.options)
    assert worse.fraction == float("inf") and "stock saves nothing" in str(worse)
    parsed(worse._repr_html_())
    worse.plot().canvas.draw()


@pytest.mark.parametrize("make, in_place", [(Block, lambda block: [block]), (stack, list)], ids=["whole", "by layers"])
def test_a_model_compiled_in_place_is_explained_as_it_was(make, in_place):
    model, options = make(), {"time_slack": 10.0}
    before = graphopt.explain(model, tokens(), options=options)
    assert before.bytes_now < before.bytes_before
    for module in in_place(model):
        module.compile(backend="lowmem_eager")
    again = graphopt.explain(model, tokens(), options=options)
    assert (again.bytes_before, again.bytes_now) == (before.bytes_before, before.bytes_now)
    assert graphopt.calibrate(model, tokens(), options=options).stock == before.bytes_before
    assert all(module._compiled_call_impl is not None for module in in_place(model))


def test_a_model_without_gradients_is_refused():
    with pytest.raises(graphopt.CaptureError):
        graphopt.explain(lambda x: x * 2, torch.randn(3))


def test_a_logging_method_that_came_after_the_import_is_passed_over(monkeypatch):
    """transformers gives Logger a `warning_once` when it is imported, which may be after graphopt."""
    monkeypatch.setattr(logging.Logger, "warning_later", lambda self, text: None, raising=False)
    linear, logger = nn.Linear(4, 4), logging.getLogger("model")

    def function(x):
        logger.warning_later("said while it is traced")
        return linear(x)

    assert graphopt.explain(function, torch.randn(2, 4)).before == ()


def test_options_are_checked():
    with pytest.raises(graphopt.OptionsError, match="dict"):
        graphopt.explain(nn.Linear(2, 2), torch.randn(1, 2), options="exact")
    with pytest.raises(graphopt.OptionsError, match="share_norm"):
        graphopt.explain(nn.Linear(4, 4), torch.randn(2, 4), options={"disable": ["share_nrom"]})
    with pytest.raises(graphopt.OptionsError, match="exact"):
        graphopt.explain(nn.Linear(4, 4), torch.randn(2, 4), preset="exakt")


def llama(layers: int, **sizes) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(num_hidden_layers=layers, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2}


def test_share_norm_fires_on_every_norm_of_llama():
    model, ids = llama(2, **TINY), torch.zeros(2, 32, dtype=torch.long)
    report = graphopt.explain(model, input_ids=ids, labels=ids, preset="exact")
    norms = {name for name, module in model.named_modules() if type(module).__name__ == "LlamaRMSNorm"}
    (record,) = [record for record in report.records if record.name == "share_norm"]
    assert {event.module for event in record.fired} == norms and not record.left_alone
    assert report.fraction < 1


def test_a_large_llama_needs_no_memory():
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(1, 2048, dtype=torch.long)
        report = graphopt.explain(llama(2), input_ids=ids, labels=ids)
    # one hidden state of 7B's width is 16.8 MB
    assert report.bytes_before > 30 * 2048 * 4096 * 2
    shown = str(report)
    assert "model.layers.*.mlp.gate_proj" in shown and "2048x11008" in shown
