"""The tables of docs/devices.md on keys in the host's memory, from benchmarks/place_kv.json."""

from __future__ import annotations

from typing import Any

from results import markdown_table, measured_on, median, result_of

NOT_YET = "Not measured yet."
_WAYS = {"host": "the host attends", "streamed": "copied", "split": "divided"}


def host_attention() -> str:
    """What the kernel reads of memory, beside a sum over it and torch's attention."""
    tables: list[str] = []
    for part in _parts("bandwidth"):
        whole = part["rows"]["sum, torch"]["bytes_a_second"]
        rows = [
            [name, f"{row['bytes_a_second'] / 1e9:.1f}", f"{row['bytes_a_second'] / whole:.0%}"]
            for name, row in part["rows"].items()
        ]
        head = [f"one text, {part['keys']:,} keys", "GB/s", "of torch's sum"]
        about = (
            f"{part['processor']}; the kernel with {part['threads']} threads and "
            f"{part['instructions']}; "
            f"{part['heads']} query heads over {part['key_heads']}, {part['dim']} features; "
            f"{part['layers']} layers. Medians."
        )
        if part.get("load", 0) > 1:
            about += f" Other work ran beside it: a load of {part['load']:.1f}."
        about = f"{about} {part.get('note', '')}".rstrip()
        tables += [markdown_table(head, rows), f"{measured_on(part, 'torch')} {about}"]
    return "\n\n".join(tables) or NOT_YET


def host_choices() -> str:
    """Every way in ten settings, and which of them the planner chose."""
    tables: list[str] = []
    for part in _parts("choices"):
        rows = []
        for row in part["rows"]:
            measured = {way: 1e3 * median(seconds) for way, seconds in row["seconds"].items()}
            rows.append(
                [
                    f"{row['batch']} x {row['keys']:,}, {row['heads']} over {row['key_heads']}",
                    *(f"{measured[way]:.2f}" if way in measured else "-" for way in _WAYS),
                    f"{_WAYS[row['chosen']]}, {1e3 * row['expected'][row['chosen']]:.2f}",
                    "yes" if row["right"] else "no",
                ]
            )
        head = ["texts, keys, heads", *_WAYS.values(), "chosen, expected", "right"]
        about = (
            f"Milliseconds of a layer's attention, medians, {part['layers']} layers one behind the "
            f"other. Right is a choice within {part['within'] - 1:.0%} of the fastest: "
            f"{part['right']} of {len(part['rows'])}. {part['processor']}."
        )
        tables += [markdown_table(head, rows), f"{measured_on(part, 'torch')} {about}"]
    return "\n\n".join(tables) or NOT_YET


def host_model() -> str:
    """A model on a small GPU, as planned and with all keys copied."""
    tables: list[str] = []
    for part in _parts("model"):
        rows = []
        for row in part["contexts"]:
            if "planned" not in row:
                continue
            planned, copied = (row[way]["tokens_a_second"] for way in ("planned", "streamed"))
            expected = 1 / row["expected"]
            rows.append(
                [
                    f"{row['context']:,}", f"{row['device_bytes'] / 1e9:.1f}",
                    f"{row['host_bytes'] / 1e9:.1f}", f"{planned:.2f}", f"{expected:.2f}",
                    f"{copied:.2f}", f"{planned / copied:.2f}",
                ]
            )  # fmt: skip
        head = [
            "tokens of context", "GB of keys on the GPU", "on the host", "tokens a second",
            "expected", "all copied", "times faster",
        ]  # fmt: skip
        prompt = part["prompt"]
        about = (
            f"A Llama-8B shape with random weights and keys, a GPU limited to {part['gpu']}; "
            f"{part['processor']}. A real prompt of {prompt['tokens']:,} tokens takes "
            f"{prompt['host']['times_device']:.2f} times as long with all keys written to the host "
            f"as with them on the GPU; logits differ by {prompt['host']['relative']:.1e} of the "
            f"largest."
        )
        tables += [markdown_table(head, rows), f"{measured_on(part, 'torch')} {about}"]
    return "\n\n".join(tables) or NOT_YET


def _parts(name: str) -> list[dict[str, Any]]:
    """Return a part's results on every kind of device, those of a GPU's machine first."""
    found = result_of("place_kv")
    return [found[key] for key in (f"{name} on cuda", f"{name} on cpu") if key in found]
