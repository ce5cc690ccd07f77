"""The README's lines for other trainers run as they stand, each in fewer saved bytes than without them."""

import re
from pathlib import Path

import accelerate
import lightning
import peft
import pytest
import torch
import transformers
import trl
from tasks import batches, counted, llama, rows
from test_other_trainers import Lit
from test_sft import texts, tokenizer
from torch.utils.data import DataLoader

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", re.search(r"clients:begin(.*?)clients:end", README, re.S)[1], re.S)


def run(block):
    """The bytes that a block saves, a step after it included where it only prepares one."""
    torch._dynamo.reset()
    model, arguments = llama(), {"output_dir": "out", "report_to": "none", "use_cpu": True, "max_steps": 1}
    names = {
        "model": model, "lit": Lit(model), "dataset": rows(), "texts": texts(), "tokenizer": tokenizer(),
        "loader": DataLoader(batches(1), batch_size=None), "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "arguments": transformers.TrainingArguments(**arguments), "Trainer": transformers.Trainer,
        "SFTConfig": lambda **given: trl.SFTConfig(**{**arguments, **given}), "SFTTrainer": trl.SFTTrainer,
        "LoraConfig": peft.LoraConfig, "Accelerator": accelerate.Accelerator, "lightning": lightning,
    }  # fmt: skip
    with counted(model) as saved:
        exec(block, names)
        if not saved.total:
            names["model"](**batches(1)[0]).loss.backward()
    return saved.total


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.match(r"# ([\w']+)", block)[1])
def test_each_block_runs_and_saves_bytes(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = r'(\w*\.?model)\.compile\(backend="lowmem"\)'
    assert len(re.findall(line, block)) == 1
    kept = run(re.sub(line, "pass", block))
    assert run(block.replace('"lowmem"', '"lowmem_eager"')) < kept
