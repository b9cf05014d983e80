"""The table of packages for two GPUs."""

from __future__ import annotations

from typing import Any

from results import markdown_table, measured_on, median, result_of

_NAMES = {"nccl": "sums by NCCL", "kernels": "sums by kernels"}


def shard() -> str:
    """A model of Llama-3.1-8B's shape on one GPU and on two."""
    result = result_of("shard")
    launches = [launch for launch in result["launches"] if "failed" not in launch]
    rows: list[list[str]] = []
    for launch in launches:
        prefill, sums = launch["prefill"], _NAMES[launch["sums"]]
        rows.append(
            [f"prefill of {result['prefill']:,} tokens, {sums}", *_pair(prefill, 1e3, "ms")]
        )
        for length, decode in launch["decode"].items():
            what = f"a token behind {int(length):,}, {sums}"
            rows.append([what, *_pair(decode, 1e3, "ms")])
    table = markdown_table(["Llama-3.1-8B's shape, bf16", "one GPU", "two GPUs", "times"], rows)
    lines = [table, f"{measured_on(result, 'torch', 'triton', 'nccl')} {_turns(launches)}"]
    lines += [_tokens(launches), _deaths(result["deaths"])]
    return "\n\n".join(lines)


def _pair(row: dict[str, list[float]], scale: float, unit: str) -> list[str]:
    one, two = median(row["one"]), median(row["two"])
    return [f"{one * scale:.2f} {unit}", f"{two * scale:.2f} {unit}", f"{one / two:.2f}"]


def _turns(launches: list[dict[str, Any]]) -> str:
    return f"Medians of {len(launches[0]['prefill']['one'])} runs, taken in turns."


def _tokens(launches: list[dict[str, Any]]) -> str:
    """Say how tokens compare between the ranks and with one GPU."""
    texts = [row for launch in launches for row in launch["tokens"]]
    steps = sum(row["new"] for row in texts)
    differ = [step for row in texts for step in row["steps_that_differ_given_one_text"]]
    same = all(row["equal_on_all_ranks"] for row in texts)
    said = f"Greedy tokens are {'equal' if same else 'not equal'} on both ranks. "
    said += f"Given one GPU's text, two choose the same token in {steps - len(differ)} of {steps}"
    if not differ:
        return f"{said} steps."
    gap = max(step["gap"] for step in differ)
    middle = median([row["median_gap_to_the_second"] for row in texts])
    return (
        f"{said} steps; in the others the two tokens' logits are {gap:.3g} apart or less, of "
        f"logits of about {differ[0]['largest']:.2g}, where the first is {middle:.2g} in front of "
        "the second in the median."
    )


def _deaths(deaths: list[dict[str, Any]]) -> str:
    """Say how long the other rank lived behind one that was killed."""
    longest = max(death["seconds"] for death in deaths)
    return (
        f"Where one rank was killed while both decoded, the other one ended within {longest:.2f} s."
    )
