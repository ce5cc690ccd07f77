"""Linking a generated kernel without reading libtorch.

A kernel of Inductor's C++ is a shared library that names torch's as those it needs, and what it calls there is looked
up as it is loaded, when they have long been in memory. Only for their names does the linker read half a gigabyte, which
is 0.5 of the 1.2 to 1.4 seconds that a small kernel takes. Empty libraries of the same names, kept in Inductor's cache,
stand in for them meanwhile: a shared library may leave open what it calls.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from ctypes import CDLL
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from torch._inductor.runtime.cache_dir_utils import cache_dir

LIBRARIES = ("torch_cpu", "torch_python")
NEEDED = f" {' '.join(f'-l{name}' for name in LIBRARIES)} "
# some compilers leave out libraries that nothing is found in, as the stand-ins
KEPT = f" -Wl,--push-state,--no-as-needed{NEEDED}-Wl,--pop-state "


def quickly(run: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """Let what runs Inductor's compile commands link against stand-ins."""

    def run_compile_cmd(cmd_line: str, cwd: str) -> None:
        run(with_stand_ins(cmd_line), cwd)

    return run_compile_cmd


def with_stand_ins(command: str) -> str:
    """The command, which looks for torch's libraries among stand-ins first; as it was where there are none.

    By a library without warnings Inductor tries out vector instructions. It is left alone, for a process without torch
    loads it, and would have to load torch's libraries too.
    """
    if sys.platform != "linux" or NEEDED not in command or " -shared " not in command or " -Wall " not in command:
        return command
    directory = _stand_ins(shlex.split(command)[0], cache_dir())
    if directory is None:
        return command
    return command.replace(NEEDED, f" -L{shlex.quote(str(directory))}{KEPT}", 1)


@cache
def _stand_ins(compiler: str, cache: str) -> Path | None:
    """A directory of empty libraries, made once in Inductor's cache; None where the compiler or linker cannot do it."""
    directory = Path(cache, f"stand_ins_{sha256(compiler.encode()).hexdigest()}")
    empty = (compiler, "-shared", "-nostdlib", "-x", "c++", "/dev/null", "-x", "none")
    try:
        for name in LIBRARIES:
            CDLL(f"lib{name}.so", os.RTLD_NOLOAD)  # fails where a build has versions in the names that it is loaded by
        if directory.is_dir():
            return directory
        with TemporaryDirectory(dir=cache) as parent:
            made = Path(parent, "made")
            made.mkdir()
            run = partial(subprocess.run, cwd=made, check=True, capture_output=True)
            for name in LIBRARIES:
                run((*empty, f"-Wl,-soname,lib{name}.so", "-o", f"lib{name}.so"))
            run((*empty, "-L.", *KEPT.split(), "-o", f"{parent}/try.so"))
            with suppress(OSError):  # another thread or process was quicker
                made.rename(directory)
    except (OSError, subprocess.CalledProcessError):
        return None
    return directory
