"""TRL's SFTTrainer trains a model that was compiled in place, alone and with LoRA."""

import warnings

import peft
import pytest
import torch
import trl
from datasets import Dataset
from tasks import BATCH, LOSS, TOKENS, VOCABULARY, compiled, counted, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tokenizer():
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def texts():
    words = torch.randint(VOCABULARY - 3, (2 * BATCH, TOKENS - 1), generator=torch.Generator().manual_seed(1))
    return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in words.tolist()]})


def train(folder, model, lora=False, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # names that transformers renames
        arguments = trl.SFTConfig(
            output_dir=str(folder), report_to="none", use_cpu=True, seed=0, disable_tqdm=True, logging_steps=1,
            max_steps=2, per_device_train_batch_size=BATCH, optim="sgd", learning_rate=0.1, save_strategy="no",
            **settings,
        )  # fmt: skip
        torch.manual_seed(2)
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM") if lora else None
        own = trl.SFTTrainer(model, arguments, train_dataset=texts(), processing_class=tokenizer(), peft_config=adapter)
    with counted(own.model) as saved:
        own.train()
    return torch.tensor([each["loss"] for each in own.state.log_history if "loss" in each]), saved.total


@pytest.mark.parametrize("lora", [False, True])
def test_losses_are_those_of_eager_and_fewer_bytes_are_saved(tmp_path, lora):
    expected, _ = train(tmp_path, llama(), lora, gradient_checkpointing=False)
    stock, kept = train(tmp_path, compiled(llama(), "aot_eager_decomp_partition", dynamic=False), lora,
                        gradient_checkpointing=False)  # fmt: skip
    torch._dynamo.reset()
    found, saved = train(tmp_path, compiled(llama()), lora, gradient_checkpointing=False)
    torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)
    torch.testing.assert_close(stock, expected, rtol=LOSS, atol=0)
    assert saved < 0.9 * kept


def test_checkpointing_which_is_its_default_leaves_nothing_to_save(tmp_path):
    assert trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True).gradient_checkpointing
    expected, kept = train(tmp_path, compiled(llama(), "aot_eager_decomp_partition", dynamic=False))
    torch._dynamo.reset()
    found, saved = train(tmp_path, compiled(llama()))
    torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)
    assert saved == kept
