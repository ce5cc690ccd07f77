"""Hugging Face's Trainer trains a model that was compiled in place before it was handed over."""

import warnings

import pytest
import torch
from tasks import BATCH, DECREASE, ENCODED, EXACT, LOSS, compiled, counted, llama, rows
from transformers import Trainer, TrainingArguments


def trainer(folder, model, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # names that transformers renames
        arguments = TrainingArguments(
            output_dir=str(folder), report_to="none", use_cpu=True, seed=0, disable_tqdm=True, logging_steps=1,
            per_device_train_batch_size=BATCH, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
            **{"max_steps": 4, "save_strategy": "no", **settings},
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(BATCH))


def train(folder, model, **settings):
    """Losses of steps and of evaluations, and the bytes saved."""
    own = trainer(folder, model, **settings)
    with counted(model) as saved:
        own.train()
    history = own.state.log_history
    losses = [each[name] for name in ("loss", "eval_loss") for each in history if name in each]
    return torch.tensor(losses), saved.total


CHECKPOINTS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def test_losses_evaluation_and_a_resumed_run_are_those_of_eager(tmp_path):
    expected, kept = train(tmp_path / "eager", llama(), **CHECKPOINTS)
    found, saved = train(tmp_path / "lowmem", compiled(llama()), **CHECKPOINTS)
    torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)
    assert len(found) == 4 + 2 and saved < 0.6 * kept
    # checkpoints are those of the model itself: a compiled one resumes, from either's
    for name in ("lowmem", "eager"):
        resumed = trainer(tmp_path / "resumed", compiled(llama()), **CHECKPOINTS)
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        history = [each["loss"] for each in resumed.state.log_history if "loss" in each]
        torch.testing.assert_close(torch.tensor(history), expected[:4], rtol=LOSS, atol=0)


def test_the_default_preset_saves_less_and_goes_down_as_far(tmp_path):
    expected, _ = train(tmp_path, llama())
    _, kept = train(tmp_path, compiled(llama()))
    found, saved = train(tmp_path, compiled(llama(), **ENCODED))
    torch.testing.assert_close(found[0], expected[0], rtol=LOSS, atol=0)
    # a step moves the loss by the rate, 0.1, times |g|^2, about 1 here, and errs by a share of that
    torch.testing.assert_close(found, expected, rtol=0, atol=DECREASE * 0.1 * 4)
    assert saved < 0.6 * kept


@pytest.mark.parametrize(
    "settings",
    [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"gradient_checkpointing": True}],
    ids=lambda each: next(iter(each)),
)
def test_settings_of_the_trainer_keep_it_on(tmp_path, settings):
    expected, kept = train(tmp_path, llama(), **{**settings, "max_steps": 2})
    found, saved = train(tmp_path, compiled(llama()), **{**settings, "max_steps": 2})
    # under autocast the gradient reads z in bfloat16, one rounding of 2^-9 more
    torch.testing.assert_close(found, expected, rtol=2**-9 if "bf16" in settings else LOSS, atol=0)
    assert saved < kept


def test_a_compile_by_the_trainer_around_it_leaves_it_on(tmp_path):
    _, expected = train(tmp_path, compiled(llama()), max_steps=1)
    torch._dynamo.reset()
    _, saved = train(tmp_path, compiled(llama()), max_steps=1, torch_compile_backend="aot_eager")
    assert saved == expected


def test_the_trainers_own_option_refuses_the_name(tmp_path):
    with pytest.raises(ValueError, match="'LOWMEM' is not a valid DynamoBackend"):
        trainer(tmp_path, llama(), torch_compile_backend="lowmem")


@pytest.mark.slow
def test_inductor(tmp_path):
    expected, kept = train(tmp_path, llama(), max_steps=2)
    found, saved = train(tmp_path, compiled(llama(), "lowmem", **EXACT), max_steps=2)
    torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)
    assert saved < 0.6 * kept
