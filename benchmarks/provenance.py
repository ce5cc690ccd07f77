"""Where figures come from: hardware, versions, commit, command. Every script writes them beside what it measures."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel")


def machine() -> dict[str, Any]:
    """What rows of one file must have in common: the hardware, and the versions of what they depend on."""
    return {"hardware": _hardware(), "versions": _versions()}


def origin() -> dict[str, Any]:
    """Of one row: the command, and the commit, `+` for local changes; None outside of a git checkout."""
    return {"commit": _commit(), "command": _command()}


def _hardware() -> str:
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"{torch.cuda.get_device_name()}, {memory:.0f} GiB"
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        run = subprocess.run(("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        # what a benchmark writes, figures and the tables made of them, is no change of what is measured
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/graphopt", ":/benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _command() -> str:
    script, *arguments = sys.argv
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments])
