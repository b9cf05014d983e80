"""Kernels in CUDA C++, compiled ahead of time without a GPU."""

from graphopt.runtime.nvrtc import Compiled, compile_cuda, nvrtc_version

__all__ = ["Compiled", "compile_cuda", "nvrtc_version"]
