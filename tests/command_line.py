"""Commands run in this process, with what they print and what they say apart."""

from __future__ import annotations

from typer.testing import CliRunner


def runner() -> CliRunner:
    """Return what runs a command and keeps stdout and stderr apart, of every click."""
    try:
        # Before click 8.2 they are one text, unless it is asked not to.
        return CliRunner(mix_stderr=False)
    except TypeError:
        return CliRunner()
