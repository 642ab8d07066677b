"""The CUDA kernels compiled for the CPU, once per run."""

import shutil

import pytest

from .cuda_on_cpu import CudaOnCpu, build, load


@pytest.fixture(scope="session")
def libraries(once):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return load(once("cuda_on_cpu", build))


@pytest.fixture(scope="session")
def cuda(libraries):
    return CudaOnCpu(libraries[0])
