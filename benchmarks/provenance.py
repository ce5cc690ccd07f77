"""Where figures come from: hardware, versions, commit, command. Every script writes them beside what it measures."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "transformers", "peft", "liger-kernel")


def machine() -> dict[str, Any]:
    """What rows of one file must have in common: the hardware, and the versions of what they depend on."""
    return {"hardware": _hardware(), "versions": _versions()}


def origin() -> dict[str, Any]:
    """Of one row: the command, and the commit, `+` for local changes; None outside of a git checkout."""
    return {"commit": _commit(), "command": _command()}


def resumed(out: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The results that `out` has, or none yet, under `head`.

    Those of another machine or setting are put aside in a file beside it, since rows of one file must be comparable.
    """
    if out.exists():
        before: dict[str, Any] = json.loads(out.read_text())
        if {**before, "rows": []} == {**head, "rows": []}:
            return before
        aside = out.with_name(f"{out.stem}.old{out.suffix}")
        os.replace(out, aside)
        print(f"{out.name} was of another machine, setting or versions: it is now {aside}")
    return {**head, "rows": []}


def write(out: Path, results: dict[str, Any]) -> None:
    """A line for each row; all at once, so that a run that is stopped leaves the file of before or the new one."""
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in results["rows"])
    head = json.dumps({**results, "rows": []}, indent=1).removesuffix("[]\n}")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    part.write_text(f"{head}[\n{rows}\n]}}\n")
    os.replace(part, out)


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
    # torch's own word: the metadata of some builds leave out what they are built for
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
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
