"""The table of docs/vision.md."""

from __future__ import annotations

from results import markdown_table, measured_on, result_of


def vision() -> str:
    """What passes do to captions of a small model, given their pictures and alone."""
    part = result_of("vision")["shapes on cpu"]
    whole = part["whole"]
    rows = [["the whole model", f"{whole['pictures']:.3f}", f"{whole['text']:.3f}", "-"]]
    for run in part["runs"]:
        figures = [f"{run[name]:.3f} ({run[name] / whole[name]:.3f})" for name in whole]
        rows.append([run["name"], *figures, f"{run['seconds']:.0f}"])
    head = ["blocks", "captions, given pictures", "captions alone", "seconds"]
    table = markdown_table(head, rows)
    note = (
        f"Perplexity, and in brackets how many times the whole model's; {part['removed']} of "
        f"{part['blocks']} blocks are taken out, and training has {part['fuse_steps']} steps."
    )
    measured = measured_on(part, "torch", "transformers")
    return f"{table}\n\n{measured} {note}"
