"""Run a function on several processes joined by gloo, and give back what it returned on each.

    found = launch(ranks, 2)  # ranks() is a module's function; torch.distributed is initialised where it runs

Each rank is a Python of its own with another hash seed. The ranks live on and wait for the next function; if one fails
or time is up, what each has printed is shown, with where it hangs, and they are gone.
"""

from __future__ import annotations

import atexit
import datetime
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 300  # seconds for a function, which takes tens of them on a busy machine
living: dict[int, Ranks] = {}  # by their number


def launch(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """What `function(*args)` returns on each rank. AssertionError with what all have printed if one fails or hangs."""
    if world not in living:
        living[world] = Ranks(world)
    return living[world].run(function, *args)


class Ranks:
    """Processes that run one function after another."""

    def __init__(self, world: int) -> None:
        self.world, self.jobs = world, 0
        self.room = tempfile.TemporaryDirectory()
        self.folder = Path(self.room.name)
        self.processes = [self._start(rank) for rank in range(world)]
        atexit.register(self.stop)

    def _start(self, rank: int) -> subprocess.Popen:
        here = Path(__file__).parent
        more = {"PYTHONHASHSEED": str(rank + 1), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        more["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), str(here.parents[1]), *sys.path])
        if sys.platform == "linux":
            more["GLOO_SOCKET_IFNAME"] = "lo"  # a host's name need not resolve
        command = [sys.executable, __file__, str(rank), str(self.world), str(self.folder)]
        with open(self._printed(rank), "w") as printed:
            return subprocess.Popen(
                command, env=os.environ | more, stdin=subprocess.PIPE, stdout=printed, stderr=printed, text=True
            )  # fmt: skip

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        self.jobs += 1
        torch.save(args, self.folder / f"args{self.jobs}")
        results = [self.folder / f"result{self.jobs}-{rank}" for rank in range(self.world)]
        for process in self.processes:
            process.stdin.write(f"{function.__module__} {function.__name__} {self.jobs}\n")
            process.stdin.flush()
        end = time.monotonic() + TIMEOUT
        while not all(result.exists() for result in results):
            if any(process.poll() is not None for process in self.processes):
                self._fail("a rank has ended")
            if time.monotonic() > end:
                self._fail(f"no answer after {TIMEOUT} s")
            time.sleep(0.05)
        return [torch.load(result, weights_only=False) for result in results]

    def _fail(self, why: str) -> None:
        time.sleep(1)  # the others may be about to say the same
        for process in self.processes:
            process.send_signal(signal.SIGABRT)  # upon which faulthandler prints where it hangs
        time.sleep(1)
        printed = [f"rank {rank}:\n{self._printed(rank).read_text()}" for rank in range(self.world)]
        self.stop()
        raise AssertionError("\n".join([why, *printed]))

    def _printed(self, rank: int) -> Path:
        return self.folder / f"printed{rank}"

    def stop(self) -> None:
        living.pop(self.world, None)
        for process in self.processes:
            process.kill()
            process.wait()
        self.room.cleanup()


def main(rank: int, world: int, folder: Path) -> None:
    warnings.filterwarnings("error", message=".* is off: .*")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    for line in sys.stdin:
        module, name, job = line.split()
        found = getattr(importlib.import_module(module), name)(*torch.load(folder / f"args{job}", weights_only=False))
        torch.save(found, folder / f"writing{rank}")
        os.replace(folder / f"writing{rank}", folder / f"result{job}-{rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
