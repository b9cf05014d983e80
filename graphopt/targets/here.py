"""What this machine lacks to emit for a target, or to run what was emitted for it.

Nothing is imported that is looked for: `graphopt targets` lists in an instant.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from importlib import metadata

from graphopt.targets import Target

NVRTC = "nvrtc"
"""CUDA's compiler as a library, which comes as a package or with a CUDA toolkit."""

_NVRTC_PACKAGES = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")
_NVRTC_LIBRARIES = ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so")
_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR

_INSTALL = {
    NVRTC: "pip install 'graphopt[cuda]'",
    "triton": "pip install 'graphopt[cuda]' on Linux; torch for CUDA brings it too",
    "onnxruntime-genai": "pip install 'graphopt[genai]'",
}
"""How to get a package, where that is not by its own name."""


@dataclass(frozen=True)
class Lack:
    """Something that a target needs and this machine does not have.

    Attributes:
        what: Such as `nvrtc >=12`.
        found: What is here instead; empty for nothing.
        purpose: `emit` where a compile for the target needs it, `run` where what was emitted does.
        remedy: How to get it.
    """

    what: str
    found: str
    purpose: str
    remedy: str

    def __str__(self) -> str:
        here = f", and here is {self.found}" if self.found else ""
        return f"to {self.purpose}: {self.what}{here} ({self.remedy})"


def missing_here(target: Target) -> list[Lack]:
    """Return what this machine lacks for a target; nothing where models for it are made and run."""
    lacking: list[Lack] = []
    for purpose, packages in (("emit", target.emit), ("run", target.runtime)):
        for package, wanted in packages.items():
            versions = _nvrtc_versions() if package == NVRTC else _package_versions(package)
            if any(fits(version, wanted) for version in versions):
                continue
            remedy = _INSTALL.get(package, f"pip install '{package}{_specifier(wanted)}'")
            if versions and purpose == "run":
                remedy = "where OUT is run, which needs no graphopt"
            named = f"{package} {wanted}" if _specifier(wanted) else package
            lacking.append(Lack(named, ", ".join(versions), purpose, remedy))
    capability = target.compute_capability
    # Where no code of ours runs, PyTorch decides which GPUs there are, some of them not NVIDIA's.
    ours = target.kernels or target.layer_kernels
    if ours and capability is not None and not _runs_on(target, capability):
        has = ", ".join(f"one of {major}.{minor}" for major, minor in sorted(_gpus()))
        lacking.append(
            Lack(
                f"a GPU of compute capability {capability[0]}.{capability[1]}",
                has,
                "run",
                "models are emitted without one; take OUT to a machine that has it",
            )
        )
    return lacking


def _runs_on(target: Target, capability: tuple[int, int]) -> bool:
    # Instructions of warpgroups are of one generation; what else there is runs on later ones too.
    same = "wgmma" in target.features
    return any(gpu >= capability and (gpu[0] == capability[0] or not same) for gpu in _gpus())


def fits(version: str, wanted: str) -> bool:
    """Return whether a version is in a range such as `>=2.7,<2.11`; other words admit any."""
    for sign, bound in re.findall(r"(>=|<)\s*([\d.]+)", wanted):
        if (_numbers(version) >= _numbers(bound)) != (sign == ">="):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def _specifier(wanted: str) -> str:
    return wanted if wanted[:1] in "<>=~" else ""


def _package_versions(name: str) -> list[str]:
    try:
        return [metadata.version(name)]
    except metadata.PackageNotFoundError:
        return []


def _nvrtc_versions() -> list[str]:
    """Return every NVRTC here: those of packages, and those of a CUDA toolkit."""
    versions = [version for name in _NVRTC_PACKAGES for version in _package_versions(name)]
    for name in _NVRTC_LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            versions.append(f"{major.value}.{minor.value}")
    return versions


def _gpus() -> set[tuple[int, int]]:
    """Return the compute capabilities of NVIDIA's GPUs here, as the driver tells them."""
    for name in _DRIVERS:
        try:
            driver = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return set()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return set()
    found: set[tuple[int, int]] = set()
    for number in range(count.value):
        device, parts = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
        status = driver.cuDeviceGet(ctypes.byref(device), number)
        for part, attribute in zip(parts, (_MAJOR, _MINOR), strict=True):
            status = status or driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
        if not status:
            found.add((parts[0].value, parts[1].value))
    return found
