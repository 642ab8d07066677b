"""The CUDA kernels compiled for the CPU, once per run."""

import shutil

import pytest

from .cuda_on_cpu import CudaOnCpu, build


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return build(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(scope="session")
def cuda(libraries):
    return CudaOnCpu(libraries[0])
