"""Generated kernels are linked against stand-ins, and load and run as if they were not."""

import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor import cpp_builder
from torch._inductor.cpu_vec_isa import VecAVX2, VecISA
from torch.utils.cpp_extension import TORCH_LIB_PATH

from graphopt import linking
from graphopt.compiling import quick_links
from graphopt.linking import with_stand_ins

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="stand-ins are made on Linux alone")
COMMAND = f"g++ k.cpp -O0 -Wall -shared -fPIC -o k.so  -ltorch -ltorch_cpu -ltorch_python -L{TORCH_LIB_PATH} "


@on_linux
def test_the_linker_reads_a_stand_in_and_the_kernel_names_the_library(tmp_path):
    source = "namespace at { class Context; Context &globalContext(); } void f() { at::globalContext(); }"
    (tmp_path / "k.cpp").write_text(source)

    def read(command):
        words = [*shlex.split(command), "-Wl,--trace"]
        found = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        needed = subprocess.run(["readelf", "-d", "k.so"], cwd=tmp_path, check=True, capture_output=True, text=True)
        assert "[libtorch_cpu.so]" in needed.stdout
        return f"{TORCH_LIB_PATH}/libtorch_cpu.so" in found

    assert read(COMMAND)
    assert not read(with_stand_ins(COMMAND))


@pytest.mark.parametrize(
    "command",
    [
        COMMAND.replace("-ltorch_python", ""),  # ahead of time, for a process without Python
        COMMAND.replace("-shared", "-c"),
        COMMAND.replace("-Wall", ""),  # by which vector instructions are tried out
        "g++ k.cpp -Wall -shared -o k.so",
        COMMAND.replace("g++", "no-such-compiler"),
        COMMAND.replace("g++", "false"),
    ],
)
def test_other_commands_stay_as_they_are(command):
    assert with_stand_ins(command) == command


@pytest.fixture
def commands(monkeypatch):
    """The compile commands that are run."""
    found = []
    compile_it = cpp_builder._run_compile_cmd
    monkeypatch.setattr(cpp_builder, "_run_compile_cmd", lambda *args: found.append(args[0]) or compile_it(*args))
    return found


@on_linux
@pytest.mark.slow
def test_what_is_linked_so_is_loaded_and_runs(commands):
    x = torch.randn(64, 64)
    with inductor.patch(force_disable_caches=True):
        found = torch.compile(lambda x: x.exp().sum(1) + x.erf().sum(1), backend="lowmem")(x)  # both of libtorch_cpu
    torch.testing.assert_close(found, x.exp().sum(1) + x.erf().sum(1))
    assert linking.KEPT in commands[-1]


@on_linux
def test_stand_ins_are_made_once_and_nothing_else_is_left(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(with_stand_ins, [COMMAND] * 8))) == 1
    (directory,) = tmp_path.iterdir()
    assert {file.name for file in directory.iterdir()} == {f"lib{name}.so" for name in linking.LIBRARIES}
    linking._stand_ins.cache_clear()  # as another process
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("made again"))
    assert str(directory) in with_stand_ins(COMMAND)


@on_linux
def test_libraries_that_are_loaded_by_other_names_have_no_stand_ins(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(linking, "LIBRARIES", ("torch_cpu_of_version_2", "torch_python"))
    assert with_stand_ins(COMMAND) == COMMAND


@on_linux
def test_vector_instructions_are_tried_out_as_before(commands, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with quick_links:  # what is compiled is loaded by a process without torch
        VecAVX2().check_build(VecISA._avx_code)
    assert len(commands) == 1
    assert linking.NEEDED in commands[0]
    assert linking.KEPT not in commands[0]
