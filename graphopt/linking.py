"""Linking a generated kernel without reading libtorch.

A kernel of Inductor's C++ is a shared library that names torch's as those it needs, and what it calls there is looked
up as it is loaded, when they have long been in memory. Only for their names does the linker read half a gigabyte, which
is 0.5 of the 1.2 seconds that a small kernel takes. Empty libraries of the same names stand in for them meanwhile: a
shared library may leave open what it calls.
"""

from __future__ import annotations

import atexit
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from tempfile import TemporaryDirectory

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
    """The command, which looks for torch's libraries among stand-ins first; as it was where there are none."""
    if sys.platform != "linux" or NEEDED not in command or " -shared " not in command:
        return command
    directory = _stand_ins(shlex.split(command)[0])
    if directory is None:
        return command
    return command.replace(NEEDED, f" -L{shlex.quote(directory.name)}{KEPT}", 1)


@cache
def _stand_ins(compiler: str) -> TemporaryDirectory[str] | None:
    """A directory of empty libraries, made once in a process; None where the compiler or linker cannot do it."""
    directory = TemporaryDirectory(prefix="graphopt_")
    atexit.register(directory.cleanup)
    empty = (compiler, "-shared", "-nostdlib", "-x", "c++", "/dev/null", "-x", "none")
    try:
        for name in LIBRARIES:
            command = (*empty, f"-Wl,-soname,lib{name}.so", "-o", f"lib{name}.so")
            subprocess.run(command, cwd=directory.name, check=True, capture_output=True)
        subprocess.run(
            (*empty, "-L.", *KEPT.split(), "-o", "try.so"), cwd=directory.name, check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return directory
