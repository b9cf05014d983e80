"""Kernels that were compiled ahead of time, loaded and launched through the CUDA driver.

Takes machine code or PTX, and torch's current device, context and stream. A kernel is called the
way a Triton kernel is: `kernel[grid](name=value, ...)`.

By ctypes rather than `cuda.core` because that, in 1.2.2, cannot allow a kernel more than 48 KB of
dynamic shared memory, takes no struct as an argument (NVIDIA/cuda-python issue 2343), and loads
PTX without the driver's log of errors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

INT, LONG, FLOAT, POINTER = ctypes.c_int, ctypes.c_longlong, ctypes.c_float, ctypes.c_void_p
Parameters = Mapping[str, Any]

_SHARED_BY_DEFAULT = 49152
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ERROR_LOG, _ERROR_LOG_SIZE = 5, 6  # of CUjit_option
_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_NO_IMAGE, _BAD_PTX, _TOO_NEW_PTX = 209, 218, 222  # of CUresult


_Three = ctypes.c_uint * 3


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: which, and its value in 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("gap", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", _Three), ("block", _Three), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )  # fmt: skip


_STARTS_EARLY = (_Attribute * 1)(_Attribute(_EARLY, 0, (ctypes.c_int * 16)(1)))


class DriverError(RuntimeError):
    """The driver refused to load or to launch a kernel."""


@cache
def cuda_driver() -> ctypes.CDLL:
    """Return the driver's library, initialised.

    Raises:
        DriverError: There is none.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError("there is no NVIDIA driver here (libcuda.so.1)") from error
    driver.cuInit(0)
    return driver


def check_status(status: int, doing: str, log: str = "") -> None:
    """Raise DriverError with the driver's words where a call did not return success."""
    if status:
        text = ctypes.c_char_p()
        cuda_driver().cuGetErrorString(status, ctypes.byref(text))
        why = (text.value or b"an unknown error").decode()
        raise DriverError(f"{doing}: {why} ({status}){': ' + log if log else ''}")


class Module:
    """A loaded cubin or PTX, of the device that is current when it is loaded.

    Args:
        image: Machine code, or PTX that ends with a zero byte.
        name: What messages call it.

    Raises:
        DriverError: The image is not for this device, or the driver cannot compile the PTX.
    """

    def __init__(self, image: bytes, name: str) -> None:
        # A tensor makes the device's context current in this thread; the driver needs one.
        torch.empty(1, device="cuda")
        driver = cuda_driver()
        self._handle = ctypes.c_void_p()
        log = ctypes.create_string_buffer(8192)
        options = (ctypes.c_int * 2)(_ERROR_LOG, _ERROR_LOG_SIZE)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
        status = driver.cuModuleLoadDataEx(
            ctypes.byref(self._handle), image, 2, options, values
        )  # fmt: skip
        if status in (_NO_IMAGE, _BAD_PTX, _TOO_NEW_PTX):
            major, minor = torch.cuda.get_device_capability()
            raise DriverError(
                f"{name} was not compiled for this GPU ({torch.cuda.get_device_name()}, "
                f"sm_{major}{minor}) or its driver: emit for it. "
                + log.value.decode(errors="replace")
            )
        check_status(status, f"cannot load {name}", log.value.decode(errors="replace"))
        self._image = image

    def function(self, name: str, shared: int) -> Function:
        """Return a kernel of the module that gets `shared` bytes of dynamic shared memory."""
        handle = ctypes.c_void_p()
        check_status(
            cuda_driver().cuModuleGetFunction(ctypes.byref(handle), self._handle, name.encode()),
            f"there is no kernel {name!r}",
        )
        if shared > _SHARED_BY_DEFAULT:
            check_status(
                cuda_driver().cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, ctypes.c_int(shared)),
                f"{name} cannot have {shared:,} bytes of shared memory",
            )
        return Function(self, handle, name, shared)


class Function:
    """A kernel of a loaded module."""

    def __init__(self, module: Module, handle: ctypes.c_void_p, name: str, shared: int) -> None:
        self._module, self._handle, self._name, self._shared = module, handle, name, shared

    def launch(
        self,
        grid: tuple[int, ...],
        threads: int,
        pointers: ctypes.Array[Any],
        early: bool = False,
    ) -> None:
        """Start the kernel on torch's current stream; `pointers` are those of its arguments.

        Args:
            early: Before the kernel in front has ended, for which the kernel itself waits.

        Raises:
            DriverError: It could not be started.
        """
        launch = _Launch(
            _Three(*grid, *(1, 1)[len(grid) - 1 :]), _Three(threads, 1, 1), self._shared,
            torch.cuda.current_stream().cuda_stream, _STARTS_EARLY, int(early),
        )  # fmt: skip
        check_status(
            cuda_driver().cuLaunchKernelEx(ctypes.byref(launch), self._handle, pointers, None),
            f"cannot start {self._name} on a grid of {grid}",
        )


class Kernel:
    """A kernel with named arguments.

    Args:
        image: Machine code, or PTX that ends with a zero byte.
        name: The name of the kernel.
        parameters: The kernel's parameters by name, in order, and the C type of each.
        threads: The number of threads of a block.
        shared: Bytes of dynamic shared memory of a block.
        check: Called with the grid and the arguments before each launch; raises ValueError at
            those the kernel would read wrongly.
    """

    def __init__(
        self,
        image: bytes,
        name: str,
        parameters: Parameters,
        *,
        threads: int,
        shared: int = 0,
        check: Callable[[tuple[int, ...], Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.name, self.parameters = name, dict(parameters)
        self.threads, self.shared = threads, shared
        self._image, self._refuse = image, check
        self._functions: dict[int, Function] = {}

    @property
    def arg_names(self) -> tuple[str, ...]:
        """The names of the arguments, in order."""
        return tuple(self.parameters)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what launches the kernel on the grid: it takes every argument by name.

        A tensor, or None for a null pointer, is passed as the address of its first element.
        Launch options of Triton, which are fixed in a compiled kernel, are taken and ignored.

        Raises:
            ValueError: An argument is missing, or not what the kernel takes.
            DriverError: The kernel could not be loaded or started.
        """

        def run(**arguments: Any) -> None:
            if self._refuse is not None:
                self._refuse(grid, arguments)
            values = [self._value(name, arguments) for name in self.parameters]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
            tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
            self.start(grid, pointers, tensors)

        return run

    def start(
        self, grid: tuple[int, ...], pointers: ctypes.Array[Any], tensors: list[Tensor]
    ) -> None:
        """Start the kernel on the device of the tensors.

        Raises:
            ValueError: They are on several devices, or on none of CUDA's.
            DriverError: The kernel could not be loaded or started.
        """
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"{self.name} takes tensors of one CUDA device, not of {names}")
        (device,) = devices
        with torch.cuda.device(device):
            if device.index not in self._functions:
                module = Module(self._image, self.name)
                self._functions[device.index] = module.function(self.name, self.shared)
            self._functions[device.index].launch(grid, self.threads, pointers)

    def _value(self, name: str, arguments: Mapping[str, Any]) -> Any:
        if name not in arguments:
            raise ValueError(f"{self.name} needs {name!r}")
        value, kind = arguments[name], self.parameters[name]
        if kind is POINTER:
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(f"{name} should be a tensor, not {value!r}")
            return POINTER(None if value is None else value.data_ptr())
        return kind(value)
