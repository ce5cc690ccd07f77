"""Caches: a warm one gives the same bytes and gradients, two settings never share a compiled graph."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
from graphopt.memory import saved_bytes

torch.manual_seed(0)
mlp = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), *mlp, nn.Dropout(0.5))
x, out = torch.randn(64, 32), []
options = json.loads(sys.argv[1])
compiled = torch.compile(model, backend="lowmem", options=options)
saved = saved_bytes(lambda: out.append(compiled(x)), [*model.parameters(), x])
out[0].square().sum().backward()
gradients = [p.grad.double().sum().item() for p in model.parameters()]
print(json.dumps({"saved": saved, "gradients": gradients, "hits": counters["aot_autograd"]["autograd_cache_hit"]}))
"""


@pytest.mark.slow
def test_a_warm_cache_gives_the_same_and_settings_do_not_mix(tmp_path):
    def run(**options):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0"}
        command = [sys.executable, "-c", SCRIPT, json.dumps(options)]
        out = subprocess.run(command, env=env, check=True, capture_output=True)
        return json.loads(out.stdout.splitlines()[-1])

    slack = {"time_slack": 10}  # codecs are worth more time than a model this small takes
    cold, warm = run(**slack), run(**slack)
    assert (cold["hits"], warm["hits"]) == (0, 1)
    assert cold["saved"] == warm["saved"] and cold["gradients"] == warm["gradients"]
    exact = run(preset="exact")
    assert exact["hits"] == 0 and exact["saved"] > cold["saved"]
    other = run(preset="exact", disable=["pack_mask"])
    assert other["hits"] == 0 and other["saved"] == exact["saved"] + 64 * 32 - 64 * 32 // 8
