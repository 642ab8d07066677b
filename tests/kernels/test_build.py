"""Building the operators on bad days. The machinery is the real one, the source is a small one."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_detr.kernels import build

from .forked import Forked

ROOT = Path(__file__).resolve().parents[2]

# A CPU kernel that takes seconds to compile and whose output can be told from the reference's.
SOURCE = """
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <torch/library.h>
at::Tensor kernel(const at::Tensor& value, at::IntArrayRef, const at::Tensor& locations,
                  const at::Tensor&) {
  return at::full({value.size(0), locations.size(1), value.size(2) * value.size(3)}, 42.0);
}
TORCH_LIBRARY_IMPL(sparse_detr, CPU, m) { m.impl("ms_deform_attn", kernel); }
"""
CALL = """
import sys
from pathlib import Path
import torch
from sparse_detr.kernels import build, ms_deform_attn
build.SOURCES = Path(sys.argv[1])
out = ms_deform_attn(torch.ones(1, 4, 1, 2), [(2, 2)], torch.full((1, 1, 1, 1, 1, 2), 0.5),
                     torch.ones(1, 1, 1, 1, 1))
print("result", out[0, 0, 0].item(), build.status("cpu").backend)
"""


# Does what c++ does, and remembers the object of the source above: the tests below compile it often.
COMPILER = """#!/bin/sh
case "$*" in *" -c {source} "*) ;; *) exec c++ "$@" ;; esac
[ -f {memory}/kernel.o ] && exec cp {memory}/kernel.o .
c++ "$@" && cp kernel.o {memory}/$$.o && mv {memory}/$$.o {memory}/kernel.o
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csrc")
    (folder / "cpu").mkdir()
    (folder / "cpu" / "kernel.cpp").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def compiler(sources):
    script = sources / "c++"
    script.write_text(COMPILER.format(source=sources / "cpu" / "kernel.cpp", memory=sources))
    script.chmod(0o755)
    return str(script)


def environment_of(folder, **changes):
    """The tests' own, but for what decides where and how operators are built."""
    decisive = ("SPARSE_DETR_OPS", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "CXX")
    env = {k: v for k, v in os.environ.items() if k not in decisive}
    env.update({"SPARSE_DETR_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **changes})
    return {k: v for k, v in env.items() if v}


@pytest.fixture
def call(sources, compiler, tmp_path):
    """Starts a process that uses the operator."""

    def start(code=CALL, **environment):
        env = environment_of(tmp_path, **{"CXX": compiler, **environment})
        return Forked(code, [str(sources)], env, tmp_path)

    return start


def finish(process):
    status, out, err = process.finish()
    assert status == 0, err
    return out.strip().splitlines()[-1], err


def scratch(cache):
    return [p for p in cache.rglob("build-*") if p.is_dir()]


COMPILED, REFERENCE = "result 42.0 cpp-cpu", "result 1.0 reference"


def test_eight_processes_starting_at_once_build_it_once(call, sources, compiler, tmp_path):
    processes = [call() for _ in range(8)]
    results = [finish(process) for process in processes]
    assert [line for line, _ in results] == [COMPILED] * 8
    assert sum("built in" in err for _, err in results) == 1
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1
    assert not scratch(tmp_path / "cache")
    # And the next one finds it there: started by hand, not by the tests' server.
    env = environment_of(tmp_path, CXX=compiler, PYTHONPATH=str(ROOT / "projects"))
    command = [sys.executable, "-c", CALL, str(sources)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == COMPILED and "building" not in done.stderr


def test_a_build_killed_half_way_is_done_again(call, tmp_path):
    first = call(CXX="")  # a compiler that takes its time
    deadline = time.monotonic() + 120
    while not any(list(p.iterdir()) for p in scratch(tmp_path / "cache")):
        assert first.alive() and time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    assert scratch(tmp_path / "cache") and not list((tmp_path / "cache").rglob("*.so"))
    line, _ = finish(call())
    assert line == COMPILED
    assert not scratch(tmp_path / "cache")


def test_a_home_that_cannot_be_written(call, tmp_path):
    line, _ = finish(call(SPARSE_DETR_CACHE="", HOME="/dev/null/home", TMPDIR=str(tmp_path)))
    assert line == COMPILED
    (private,) = tmp_path.glob("sparse_detr-*")
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_private_folder_that_others_can_write_is_not_trusted(call, tmp_path):
    def ask():
        code = "from sparse_detr.kernels import build; print(build.cache_dir())"
        return call(code=code, SPARSE_DETR_CACHE="", HOME="/dev/null/home", TMPDIR=str(tmp_path))

    folder = Path(finish(ask())[0])
    folder.chmod(0o777)
    status, _, err = ask().finish()
    assert status and "set SPARSE_DETR_CACHE" in err


def test_no_compiler_means_plain_pytorch_and_one_warning(call):
    twice = CALL + CALL.split("build.SOURCES = Path(sys.argv[1])")[1]
    line, err = finish(call(code=twice, CXX="/nonexistent/c++"))
    assert line == REFERENCE
    assert err.count("runs in plain PyTorch") == 1
    assert "no C++ compiler (/nonexistent/c++ is not on the PATH)" in err


def test_an_empty_compiler_variable_is_none_and_a_wrapper_may_stand_before_it(monkeypatch):
    monkeypatch.setenv("CXX", "")
    assert build._compiler() == ("c++",)
    monkeypatch.setenv("CXX", "env c++")
    assert build._version_of(*build._compiler()) == build._version_of("c++")


def test_without_a_compiler_gradients_are_the_formulas(call):
    """Also those of the first call, which has entered the operator when the build fails."""
    code = """
import torch
from sparse_detr.kernels import build, ms_deform_attn_fused, key_aware_deform_attn
shapes, inputs = [(3, 2)], [torch.randn(1, 6, 1, 2), torch.rand(1, 4, 1, 2),
                            torch.randn(1, 4, 1, 1, 3, 2), torch.randn(1, 4, 1, 3)]
found = []
for attempt in range(2):
    assert build.is_unavailable("cpu") == bool(attempt)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = ms_deform_attn_fused(leaves[0], shapes, *leaves[1:])
    found.append(torch.autograd.grad(out.square().sum(), leaves))
for first, second in zip(*found):
    torch.testing.assert_close(first, second)
flat, (value, query) = [3, 2], (inputs[0], torch.randn(1, 4, 1, 2))
locations = torch.rand(1, 4, 1, 1, 3, 2)
for key in (None, value):
    out, lse = torch.ops.sparse_detr.key_aware_deform_attn(query, key, value, flat, locations)
    found = torch.ops.sparse_detr.key_aware_deform_attn_backward(
        torch.ones_like(out), out, lse, query, key, value, flat, locations, [True] * 4)
    leaves = [x.clone().requires_grad_() for x in (query, value, locations)]
    out = key_aware_deform_attn(leaves[0], None, leaves[1], shapes, leaves[2])
    expected = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2] + (0 if key is None else found[1]), expected[1])
    torch.testing.assert_close(found[3], expected[2])
print("fine")
"""
    line, err = finish(call(code=code, CXX="/nonexistent/c++"))
    assert line == "fine" and err.count("runs in plain PyTorch") == 1


def test_tracing_needs_no_build(call, tmp_path):
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from sparse_detr.kernels import build, ms_deform_attn
with FakeTensorMode():
    value, locations = torch.ones(1, 4, 2, 3), torch.ones(1, 5, 2, 1, 1, 2)
    weights = torch.ones(1, 5, 2, 1, 1)
    print(tuple(ms_deform_attn(value, [(2, 2)], locations, weights).shape), build.status("cpu").backend)
"""
    line, _ = finish(call(code=code))
    assert line == "(1, 5, 6) not built" and not list((tmp_path / "cache").rglob("*.so"))


def test_what_was_built_earlier_is_not_called_not_built(monkeypatch, tmp_path):
    library = tmp_path / "library.so"
    plan = SimpleNamespace(library=library, folder=tmp_path)
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_failed", {})
    monkeypatch.setattr(build, "mode", lambda: "auto")
    monkeypatch.setattr(build.Plan, "make", lambda device_type: plan)
    status = build.status("cpu")
    assert status.backend == "not built" and "will be built at the first call" in status.reason
    library.touch()
    status = build.status("cpu")
    assert status.backend == "not loaded" and status.reason.endswith("built earlier")


def test_a_compiler_that_fails_means_plain_pytorch_and_its_message(call, sources, tmp_path):
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "kernel.cpp").write_text("int x = undeclared_name;\n")
    code = CALL.replace("sys.argv[1]", repr(str(tmp_path / "csrc")))
    line, err = finish(call(code=code))
    assert line == REFERENCE and "undeclared_name" in err


def test_a_demanded_operator_that_cannot_be_built_is_an_error(call):
    status, _, err = call(CXX="/nonexistent/c++", SPARSE_DETR_OPS="cpu").finish()
    assert status and "BuildError: no C++ compiler" in err


def test_reference_mode_builds_nothing(call, tmp_path):
    line, err = finish(call(SPARSE_DETR_OPS="reference"))
    assert line == REFERENCE and "plain PyTorch" not in err
    assert not (tmp_path / "cache").exists()


def test_an_unknown_mode_is_refused(call):
    status, _, err = call(SPARSE_DETR_OPS="gpu").finish()
    assert status and "SPARSE_DETR_OPS='gpu' is not one of auto, reference, cpu, cuda" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_nvcc_without_a_gpu_builds_for_the_cpu(call, tmp_path):
    """The GPU decides, not the compiler's presence."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\ntouch {tmp_path}/nvcc-was-called\nexit 1\n")
    nvcc.chmod(0o755)
    code = CALL + "print(build.status('cuda').reason)\nprint('result', build.status().backend)\n"
    process = call(
        code=code, CUDA_HOME=str(nvcc.parents[1]), PATH=f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    )
    line, err = finish(process)
    assert line == "result cpp-cpu", err
    assert not (tmp_path / "nvcc-was-called").exists()


def test_an_implementation_is_chosen_for_a_block_and_a_thread(call):
    """Also once the compiled operator is loaded; whatever happens, the choice ends with the block."""
    code = (
        CALL
        + """
import threading
from sparse_detr.kernels import implementation

def now():
    out = ms_deform_attn(torch.ones(1, 4, 1, 2), [(2, 2)], torch.full((1, 1, 1, 1, 1, 2), 0.5),
                         torch.ones(1, 1, 1, 1, 1))
    return out[0, 0, 0].item(), build.status("cpu").backend

found = [now()]
try:
    with implementation("reference"):
        found.append(now())
        other = threading.Thread(target=lambda: found.append(now()))
        other.start()
        other.join()
        with implementation("auto"):
            found.append(now())
        found.append(now())
        raise KeyError
except KeyError:
    found.append(now())
compiled, plain = (42.0, "cpp-cpu"), (1.0, "reference")
assert found == [compiled, plain, compiled, compiled, plain, compiled], found
print("fine")
"""
    )
    assert finish(call(code=code))[0] == "fine"


def test_an_implementation_that_is_demanded_after_its_build_has_failed_is_an_error(call):
    code = CALL + "\nwith build.implementation('cpu'):\n    ms_deform_attn(out.view(1, 1, 1, 2), [(1, 1)], "
    code += "torch.zeros(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1))\n"
    process = call(code=code, CXX="/nonexistent/c++")
    status, out, err = process.finish()
    assert out.strip() == REFERENCE
    assert status and "BuildError: no C++ compiler" in err


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="'gpu' is not one of auto, reference, cpu, cuda"):
        with build.implementation("gpu"):
            pass


def test_torchs_build_module_keeps_its_settings():
    """Its logger, its CUDA_HOME and the process's environment."""
    from torch.utils import cpp_extension

    logger = logging.getLogger("torch.utils.cpp_extension")
    before = logger.level, cpp_extension.CUDA_HOME, dict(os.environ)
    plan = build.Plan("cuda", (), (), (), (("CUDA_HOME", "/toolkit"),), Path())
    with build._environment(plan) as module:
        assert module is cpp_extension and module.CUDA_HOME == os.environ["CUDA_HOME"] == "/toolkit"
    assert (logger.level, cpp_extension.CUDA_HOME, dict(os.environ)) == before
