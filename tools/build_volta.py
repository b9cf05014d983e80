"""Compiles the Volta kernels of every form that is tested, to PTX for a machine that cannot.

    python tools/build_volta.py FOLDER [--only WORD]

needs no GPU, but NVRTC of CUDA 12 (`pip install 'graphopt[cuda]'`). On a machine with any NVIDIA
GPU of compute capability 7.0 or newer the driver compiles the PTX:

    GRAPHOPT_VOLTA_PTX=FOLDER python -m pytest -m gpu tests/test_gpu_volta.py

`forms.json` in the folder has the constants each was compiled with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from volta_forms import FORMS, file_name

from graphopt.errors import GraphoptError
from graphopt.lowering.kernels.volta_cuda import compile_volta


def build(folder: Path, only: str = "") -> int:
    """Compile the forms whose name has `only` in it; return the bytes written.

    Raises:
        LoweringError: There is no compiler for Volta here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, listed = 0, {}
    for name, form in FORMS.items():
        if only not in name:
            continue
        constants = form.constants()
        compiled = compile_volta(constants, "compute_70")
        (folder / file_name(name)).write_text(compiled.ptx, encoding="utf-8")
        written += len(compiled.ptx)
        listed[name] = constants
    text = json.dumps(listed, indent=1, sort_keys=True)
    (folder / "forms.json").write_text(text + "\n", encoding="utf-8")
    return written + len(text) + 1


def main() -> int:
    """Run the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", metavar="WORD", help="forms with this in their name")
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        written = build(arguments.folder, arguments.only)
    except GraphoptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    files = len(list(arguments.folder.glob("*.ptx")))
    seconds = time.monotonic() - start
    print(f"{files} files, {written / 1e6:.1f} MB, {seconds:.0f} s: {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
