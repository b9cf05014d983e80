"""Pages in headless Chromium: screenshots, and what makes them hard to read or to use.

Chromium is found by its usual names, or by the environment variable CHROMIUM. axe-core, which
checks accessibility, is one file of the npm package of that name: AXE_CORE is the path of its
axe.min.js (`npm pack axe-core` fetches it).
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
    "--force-color-profile=srgb", "--disable-dev-shm-usage",
)  # fmt: skip

_LOOK = """
async function look() {
  const found = {height: document.documentElement.scrollHeight, wide: [], violations: []};
  const width = document.documentElement.clientWidth;
  for (const element of [document.documentElement, ...document.querySelectorAll("main, main *")]) {
    const hidden = getComputedStyle(element).clipPath !== "none" || element.closest("thead");
    const box = element.getBoundingClientRect();
    const scrolls = element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0
      && getComputedStyle(element).display !== "inline";
    if (!hidden && (scrolls || box.right > width + 1)) {
      found.wide.push(element.tagName + "." + element.getAttribute("class"));
    }
  }
  if (window.axe) {
    const result = await axe.run(document, {resultTypes: ["violations"]});
    found.violations = result.violations.map(v => ({
      rule: v.id, impact: v.impact, help: v.help, places: v.nodes.map(n => n.html.slice(0, 200)),
    }));
  }
  document.body.replaceChildren();
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
}
look();
"""


@dataclass(frozen=True)
class Look:
    """What a page is like at one width.

    Attributes:
        height: Of the whole page, in pixels.
        wide: Elements whose content is wider than they are, or than the window.
        violations: What axe-core found, as rule, impact, help and places; empty without it.
    """

    height: int
    wide: list[str]
    violations: list[dict[str, Any]]


def chromium() -> str | None:
    """Return the path of Chromium; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def axe_core() -> Path | None:
    """Return the path of axe-core's script; None where there is none."""
    path = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
    return path if path.is_file() else None


def _run(arguments: list[str], profile: str) -> str:
    browser = chromium()
    if browser is None:
        raise FileNotFoundError("there is no Chromium here: install it, or set CHROMIUM")
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout


def look_at(page: Path, width: int, *, dark: bool = False, axe: Path | None = None) -> Look:
    """Open a page in a window so many pixels wide, and return what it is like there.

    Args:
        dark: With the colours of a dark screen.
        axe: axe-core's script; None to leave accessibility unchecked.
    """
    scripts = [] if axe is None else [axe.read_text(encoding="utf-8")]
    # The end of a script's tag may not stand in one.
    whole = [script.replace("</script", "<\\/script") for script in (*scripts, _LOOK)]
    tags = [f"<script>{script}</script>" for script in whole]
    text = page.read_text(encoding="utf-8").replace("</body>", "".join(tags) + "</body>")
    with tempfile.TemporaryDirectory(prefix="graphopt-page-") as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(text, encoding="utf-8")
        options = ["--blink-settings=preferredColorScheme=0"] if dark else []
        shown = _run(
            [*options, f"--window-size={width},1000", "--virtual-time-budget=30000", "--dump-dom",
             copy.as_uri()],
            folder,
        )  # fmt: skip
    told = re.search(r'<pre id="told">(.*?)</pre>', shown, re.DOTALL)
    if told is None:
        raise RuntimeError(f"Chromium did not run the script in {page}: {shown[:300]}")
    return Look(**json.loads(html.unescape(told[1])))


def take_screenshot(page: Path, picture: Path, width: int) -> None:
    """Write a picture of a whole page in a window so many pixels wide."""
    height = look_at(page, width).height
    with tempfile.TemporaryDirectory(prefix="graphopt-page-") as profile:
        _run(
            [f"--window-size={width},{height}", f"--screenshot={picture.resolve()}",
             page.resolve().as_uri()],
            profile,
        )  # fmt: skip
