"""PEFT's adapters, accelerate's own loop, and Lightning."""

import pickle

import lightning
import peft
import pytest
import torch
from accelerate import Accelerator
from tasks import EXACT, LOSS, batches, compiled, counted, llama
from torch.utils.data import DataLoader

import graphopt


def adapted(model=None, **settings):
    model = model or llama()
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(model, config)


def train(model, step=lambda model, batch: model(**batch).loss):
    """Losses of plain steps, and the bytes saved."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    losses = []
    with counted(model) as saved:
        for batch in batches(3):
            loss = step(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses), saved.total


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_train_as_in_eager_and_save_less(dora):
    expected, kept = train(adapted(use_dora=dora))
    found, saved = train(compiled(adapted(use_dora=dora)))
    torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)
    assert saved < (1 if dora else 0.9) * kept  # PEFT's DoRA breaks the graph at each layer, under any backend


def test_a_model_may_be_compiled_before_it_is_adapted():
    _, after = train(compiled(adapted()))
    _, before = train(adapted(compiled(llama())))
    assert before == after


def test_accelerate_prepares_a_model_that_is_compiled():
    def prepared(model, **settings):
        accelerator = Accelerator(cpu=True, **settings)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(batches(4), batch_size=None))
        losses = []
        with counted(model) as saved:
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        return torch.tensor(losses), saved.total, set(accelerator.get_state_dict(model))

    expected, kept, names = prepared(llama(), gradient_accumulation_steps=2)
    for model in (compiled(llama()), torch.compile(llama(), backend="lowmem_eager", **EXACT)):
        torch._dynamo.reset()
        found, saved, own = prepared(model, gradient_accumulation_steps=2)
        torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)
        assert saved < 0.6 * kept and {each.removeprefix("_orig_mod.") for each in own} == names


class Lit(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning(tmp_path):
    def fit(lit):
        own = getattr(lit, "_orig_mod", lit)
        with counted(own) as saved:
            lightning.Trainer(
                max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, default_root_dir=tmp_path, gradient_clip_val=0.5,
            ).fit(lit, DataLoader(batches(3), batch_size=None))  # fmt: skip
        return torch.tensor(own.losses), saved.total

    expected, kept = fit(Lit(llama()))
    found, saved = fit(Lit(compiled(llama())))
    torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)
    assert saved < 0.6 * kept
    torch._dynamo.reset()
    found, whole = fit(torch.compile(Lit(llama()), backend="lowmem_eager", **EXACT))
    torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)
    assert whole == saved
    # Lightning calls training_step, not the module: compiled in place it is passed by
    lit = Lit(llama())
    lit.compile(backend="lowmem_eager")
    assert fit(lit)[1] == kept


def test_explain_leaves_nothing_on_a_model_where_lightning_is_imported():
    """Lightning's torch.compile keeps its arguments on the model, which could not be pickled any more."""
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.randn(4, 8)
    before = set(vars(model))
    graphopt.explain(model, x)
    assert set(vars(model)) == before
    pickle.dumps(model)
