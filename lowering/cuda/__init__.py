"""Kernels in CUDA C++, compiled ahead of time without a GPU."""

from graphopt.lowering.cuda.compile import Compiled, compile_cuda, nvrtc_version

__all__ = ["Compiled", "compile_cuda", "nvrtc_version"]
