"""Pictures of reports for the documentation, and whether anything in them scrolls sideways.

    python tools/report_pictures.py [NAME=FOLDER ...] [--to docs/pictures]

NAME=FOLDER is an output folder of graphopt, or NAME=FILE.html a page of `graphopt memory`; without
any, the demo is compiled in three ways, which takes some minutes. Each page is shown in windows of
1,400 and 500 pixels. Needs Chromium, and uses Pillow, where it is installed, to make the files
small.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from browser import axe_core, look_at, take_screenshot

WIDTHS = (1400, 500)

RECIPES = {
    "plain": [],
    "pruned": ["--passes", "prune-blocks{ratio=0.25}"],
    "carved": ["--passes", "carve-moe{shared=3,active=3,experts=8}"],
}

COLOURS = 160
"""Colours of a picture: a page has a dozen, and their blends at the edges of letters."""


def shrink(picture: Path) -> None:
    """Write a picture again with a palette, where Pillow is installed."""
    try:
        from PIL import Image
    except ImportError:
        return
    with Image.open(picture) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(
            picture, optimize=True
        )


def compiled(folder: Path, name: str) -> Path:
    """Compile the demo by one of the recipes, and return the output folder."""
    command = [sys.executable, "-m", "graphopt.cli.commands", "compile", "demo"]
    subprocess.run([*command, "--out", name, *RECIPES[name]], cwd=folder, check=True)
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reports", nargs="*", metavar="NAME=PATH")
    parser.add_argument("--to", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    wrong = False
    with tempfile.TemporaryDirectory(prefix="graphopt-reports-") as work:
        folders = dict(item.split("=", 1) for item in arguments.reports)
        for name in folders or RECIPES:
            found = Path(folders[name]) if folders else compiled(Path(work), name)
            page = found / "report.html" if found.is_dir() else found
            stem = f"report-{name}" if found.is_dir() else name
            for width in WIDTHS:
                picture = arguments.to / f"{stem}-{width}.png"
                take_screenshot(page, picture, width)
                shrink(picture)
                look = look_at(page, width, axe=axe_core())
                wrong |= bool(look.wide or look.violations)
                print(f"{picture}  {look.height} px high  {picture.stat().st_size // 1024} kB")
                print(*[f"  wider than its place: {item}" for item in look.wide], sep="\n")
                print(*[f"  {v['rule']}: {v['help']}" for v in look.violations], sep="\n")
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
