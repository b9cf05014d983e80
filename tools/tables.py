"""Write the tables of the documentation from the results under benchmarks/.

    python tools/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a function below.
With --check nothing is written, and the exit code is 1 where a table is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ablation_tables import bits, bits_kernels, int4_onnx
from family_tables import families, vision_families
from host_tables import host_attention, host_choices, host_model
from kv_tables import kv, kv_onnx, kv_speed
from memory_tables import (
    memory_capacity,
    memory_events,
    memory_overhead,
    memory_peaks,
    onnx_memory,
)
from model_tables import models, models_answers, models_choice
from paper_tables import memory_paper, memory_paper_addresses, memory_passes
from plan_tables import allocation, allocation_greedy, arena
from rank_tables import data_parallel
from results import ROOT, markdown_table, measured_on, median, result_of
from shard_tables import shard
from sum_tables import (
    sums,
    sums_of_attention,
    sums_of_attention_predicted,
    sums_of_few,
    sums_predicted,
)
from vision_tables import vision

PAGES = (
    "README.md", "docs/attention.md", "docs/bits.md", "docs/depth.md", "docs/devices.md",
    "docs/evaluate.md",
    "docs/families.md", "docs/flatquant.md", "docs/kv.md", "docs/memory.md", "docs/methods.md",
    "docs/vision.md", "docs/volta.md", "docs/width.md",
)  # fmt: skip
_TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end table -->", re.DOTALL)


def demo() -> str:
    """SmolLM2 beside onnxruntime-genai's model builder."""
    result = result_of("demo")
    found = result["summary"]
    speed, equal = found["decode_tokens_per_second"], found["prompts_with_equal_tokens"]
    prompts = found["prompts"]

    def seconds(name: str) -> str:
        return f"{found[f'{name}_seconds']:.1f} s"

    def memory(name: str) -> str:
        return f"{found[f'{name}_peak_bytes'] / 1e9:.2f} GB"

    rows = [
        ["time to compile", seconds("unverified"), seconds("builder")],
        ["the same, every pass verified", seconds("verified"), "-"],
        ["peak memory, verified", memory("verified"), memory("builder")],
        [
            "decoding under onnxruntime-genai, tokens a second",
            f"{speed['graphopt']:.1f}",
            f"{speed['builder']:.1f}",
        ],
        [
            "greedy tokens equal to transformers' in fp32, prompts",
            f"{equal['graphopt']} of {prompts}",
            f"{equal['builder']} of {prompts}",
        ],
    ]
    table = markdown_table(["SmolLM2-135M-Instruct, fp32", "graphopt", "model builder"], rows)
    packages = ("torch", "transformers", "onnxruntime", "onnxruntime-genai")
    return f"{table}\n\n{measured_on(result, *packages)} Medians of three runs, taken in turns."


def quality() -> str:
    """The same model in three forms."""
    result = result_of("quality")
    rows = [
        [
            name,
            f"{run['perplexity']:.4f}",
            f"{run['tokens']}",
            f"{run['piqa_accuracy']:.2%}",
            f"{run['piqa_rows']}",
        ]
        for name, run in result["runs"].items()
    ]
    head = ["form", f"perplexity on {result['text']}", "tokens", "PIQA", "questions"]
    packages = ("torch", "transformers", "onnxruntime")
    return f"{markdown_table(head, rows)}\n\n{measured_on(result, *packages)}"


def beginnings() -> str:
    """Perplexity with and without the beginning-of-sequence token before every window."""
    result = result_of("beginnings")
    runs = result["runs"]
    rows = [
        [run["every"]["model"], *(f"{run[way]['perplexity']:.2f}" for way in ("every", "first"))]
        for run in runs
    ]
    size = runs[0]["every"]
    head = ["model", "before every window", "before the first alone (`--bos first`)"]
    return (
        f"{markdown_table(head, rows)}\n\n{measured_on(result, 'torch', 'transformers')} "
        f"Perplexity on {size['windows']} windows of {size['seqlen']} tokens."
    )


def scale() -> str:
    """What a large model costs."""
    result = result_of("scale")
    found = result["summary"]
    rows = [
        [
            "`graphopt inspect --config` of a 70B Llama, 80 layers",
            f"{found['inspect_70b_seconds']:.1f} s",
            f"{found['inspect_70b_peak_bytes'] / 1e9:.2f} GB resident",
        ],
        [
            f"`graphopt compile --emit hf` of {found['compile_1_5b_parameters'] / 1e9:.2f}B "
            f"parameters, bf16 in {found['compile_1_5b_shards']} shards",
            f"{found['compile_1_5b_seconds']:.1f} s",
            f"{found['compile_1_5b_anonymous_bytes_above_imports'] / 1e9:.2f} GB anonymous above "
            "the imports",
        ],
    ]
    table = markdown_table(["", "time", "memory"], rows)
    runs = len(result["inspect_runs"])
    measured = measured_on(result, "torch", "transformers")
    return f"{table}\n\n{measured} The slowest and the largest of {runs} runs each."


def attention() -> str:
    """Prefill beside torch's own kernels."""
    result = result_of("attention")
    lengths = sorted({row["length"] for row in result["prefill"]})
    speeds: dict[tuple[int, bool, str], dict[int, float]] = {}
    for row in result["prefill"]:
        form = row["head_dim"], row["causal"], row["kernel"]
        speeds.setdefault(form, {})[row["length"]] = row["tflops"]
    rows = [
        [
            str(width),
            "causal" if causal else "full",
            kernel,
            *(f"{found[length]:.0f}" for length in lengths),
        ]
        for (width, causal, kernel), found in sorted(
            speeds.items(), key=lambda i: (*i[0][:2], i[0][2].lower())
        )
    ]
    head = ["D", "", "TFLOP/s, bf16", *(f"{length:,}" for length in lengths)]
    note = (
        "`ampere` is its kernel compiled for sm_80, so run with Ampere's instructions on this "
        "card: a statement about the code, not about an A100."
    )
    return f"{markdown_table(head, rows)}\n\n{measured_on(result, 'torch', 'triton')} {note}"


def attention_sweep() -> str:
    """Drawn descriptions by kernel: how many were right, and the worst of them beside fp32."""
    results = [result_of(f"attention_sweep_{name}") for name in ("1", "2", "ascend")]
    rows = []
    for kind in dict.fromkeys((r["target"], r["kernel"]) for x in results for r in x["summary"]):
        mine = [
            row
            for result in results
            for row in result["rows"]
            if (row["target"], row["kernel"]) == kind and row["verdict"] != "not run"
        ]
        right = [row for row in mine if row["verdict"] == "right"]

        def largest(beside: str, right: list[dict[str, Any]] = right) -> str:
            return f"{max(row['error'] / row[beside] for row in right if row[beside]):.2f}"

        rows.append(
            [
                kind[0],
                kind[1] + (", interpreted" if kind[1] == "ascend-triton" else ""),
                f"{len(right):,} of {len(mine):,}",
                largest("reference"),
                largest("weights"),
            ]
        )
    head = ["target", "kernel", "within what is allowed", "largest error over that of fp32",
            "over that of fp32 with 16-bit weights"]  # fmt: skip
    sanitizer = result_of("attention_sanitizer")
    count = sum(row["count"] for row in sanitizer["sanitizer"])
    note = (
        f"The second seed: `{results[1]['command']}`. Under memcheck {sanitizer['clean']} of "
        f"{count} were clean: `{sanitizer['command']}`."
    )
    return f"{markdown_table(head, rows)}\n\n{measured_on(results[0], 'torch', 'triton')} {note}"


def decode() -> str:
    """One token over a long cache, beside torch's own kernels."""
    result = result_of("attention")
    rows = [
        [
            f"{row['keys']:,}",
            row["kernel"],
            f"{row['microseconds']:.1f}",
            f"{row['tb_per_s']:.2f}",
        ]
        for row in result["decode"]
    ]
    table = markdown_table(["keys", "decode, 32 heads over 8, D 128", "µs", "TB/s"], rows)
    return f"{table}\n\nA copy on the same card moves {result['copy_tb_per_s']:.2f} TB/s."


def generation() -> str:
    """A whole emitted model's decoding, beside transformers."""
    result = result_of("decode")
    speeds = result["summary"]["tokens_per_second"]
    names = {
        "graphopt": f"the emitted package, `--target {result['target']}`",
        "compiled": "transformers, static cache, the step under `torch.compile`",
        "generate": "transformers, `generate`",
    }
    rows = [
        [text, f"{speeds[name]:.0f}", f"{speeds['graphopt'] / speeds[name]:.1f}"]
        for name, text in names.items()
    ]
    what = f"SmolLM2-135M-Instruct, {result['dtype']}, one text"
    head = [what, "tokens a second", "times slower"]
    measured = measured_on(result, "torch", "transformers", "triton")
    note = (
        "Medians of five runs, taken in turns. So small a model waits for its launches, and for "
        "those the host's processor counts as much as the GPU."
    )
    return f"{markdown_table(head, rows)}\n\n{measured} {note}"


def forms() -> str:
    """Forms that torch's fixed kernels lack, beside FlexAttention."""
    result = result_of("attention")
    rows = [
        [row["form"], str(row["head_dim"]), f"{row['length']:,}", f"{row['faster']:.2f}"]
        for row in result["forms"]
    ]
    return markdown_table(["form", "D", "length", "times faster than FlexAttention"], rows)


def depth() -> str:
    """A quarter of the blocks removed, and what was put back in how many seconds."""
    result = result_of("depth")
    rows, notes = [], []
    for device in ("cuda", "cpu"):
        part = result.get(f"recover on {device}")
        if part is None:
            continue
        place = "GPU" if device == "cuda" else "CPU"
        rows += [_recovered(run, place) for run in part["runs"] if not _is_ablation(run)]
        dense = part["dense"]
        piqa = f", PIQA {dense['piqa']:.1%}" if "piqa" in dense else ""
        # The recipes are in the rows.
        part = {**part, "command": part["command"].partition(" --recipe")[0]}
        notes.append(
            f"{measured_on(part, 'torch', 'transformers')} The whole model has perplexity "
            f"{dense['perplexity']:.2f}{piqa} on {part['windows']} windows of 2,048 tokens of "
            f"{part['text']}; calibration text {part['calib']}."
        )
    return "\n\n".join([markdown_table(_RECOVERED, rows), *notes])


_RECOVERED = ["recipe", "", "seconds", "perplexity", "times the whole model's", "PIQA"]


_RENAMED = {
    "own_text=": "generated_windows=",
    "by_layer=": "layerwise_budget=",
    "mode=faithful": "mode=published",
    "normalised=": "cosine=",
    "controls=": "ablations=",
}
"""Options that have another name today than in recipes that were measured before."""


def _recipe(run: dict[str, Any]) -> str:
    """Return the recipe of a run, whose record is as it was typed, by the names of today."""
    recipe = str(run["recipe"])
    for then, now in _RENAMED.items():
        recipe = re.sub(rf"(?<=[{{,]){then}", now, recipe)
    return recipe


def _is_ablation(run: dict[str, Any]) -> bool:
    """Whether a run is of given blocks, or of another method: it shows what a part does."""
    return "remove=" in _recipe(run) or "mode=published" in _recipe(run)


def _recovered(run: dict[str, Any], place: str) -> list[str]:
    return [
        f"`{_recipe(run)}`",
        place,
        f"{run['seconds']:.0f}",
        f"{run['perplexity']:.2f}",
        f"{run['times_dense']:.3f}",
        f"{run['piqa']:.1%}" if "piqa" in run else "-",
    ]


def depth_parts() -> str:
    """What the parts of recovery do, and the paper's way with what its donors come to."""
    part = result_of("depth")["recover on cuda"]
    runs = [run for run in part["runs"] if _is_ablation(run)]
    tables = [markdown_table(_RECOVERED, [_recovered(run, "GPU") for run in runs])]
    for run in runs:
        ablations = run["passes"].get("fuse-blocks", {}).get("ablations")
        if ablations:
            rows = [[c["donor"], f"{c['loss']:.0f}", f"{c['perplexity']:.2f}"] for c in ablations]
            head = ["first block fused with donor", "loss on held-out text", "perplexity on it"]
            tables.append(markdown_table(head, rows))
    return "\n\n".join(tables)


def depth_speed() -> str:
    """What scoring takes, and what fewer blocks give."""
    result = result_of("depth")
    rows = []
    scores = result.get("scores on cpu")
    if scores:
        times = scores["seconds"]
        rows.append(
            [
                f"scoring {scores['blocks']} blocks of SmolLM2-135M, one walk",
                f"{median(times['one walk']):.1f} s",
                f"a run of the model for each: {median(times['naive']):.1f} s; largest difference "
                f"of a score {scores['largest_difference']:.0e}",
                scores["device"],
            ]
        )
    shape = result.get("shape on cuda")
    if shape:
        rows.append(
            [
                "scoring 32 blocks of a Llama-7B's shape, bf16, 32 windows of 2,048 tokens",
                f"{shape['seconds']:.0f} s",
                f"peak memory {shape['peak_bytes'] / 1e9:.1f} GB",
                shape["device"],
            ]
        )
    onnx = result.get("onnx on cpu")
    if onnx:
        speeds = onnx["tokens_per_second"]
        whole = median(speeds["dense"])
        rows.append(
            [
                "decoding by ONNX Runtime, 22 of 30 blocks",
                f"{median(speeds['pruned']):.1f} tokens a second",
                f"{onnx['times_faster']:.2f} times the whole model's {whole:.1f}",
                onnx["device"],
            ]
        )
    return markdown_table(["", "", "", "on"], rows)


def width_onnx() -> str:
    """What carved models take in ONNX Runtime, in terms of the dense one."""
    result = result_of("width")["onnx on cpu"]
    splits = result["splits"]
    kinds = {
        f"feed-forward parts, {result['tokens']} tokens": ("ffn", "carved"),
        f"by `com.microsoft::MoE`, {result['tokens']} tokens": ("ffn", "moe"),
        "feed-forward parts, 1 token": ("ffn of one token", "carved"),
        "by `com.microsoft::MoE`, 1 token": ("ffn of one token", "moe"),
        f"prefill of {result['tokens']} tokens": ("prefill", "carved"),
        f"by `com.microsoft::MoE`, prefill of {result['tokens']} tokens": ("prefill", "moe"),
        "a decoding step": ("decode", "carved"),
        "by `com.microsoft::MoE`, a decoding step": ("decode", "moe"),
    }
    rows = [
        [label, *(f"{found[part]['share'][side]:.2f}" for found in splits.values())]
        for label, (part, side) in kinds.items()
    ]
    table = markdown_table(["time, dense = 1", *splits], rows)
    return f"{table}\n\n{measured_on(result, 'onnxruntime')}"


def width() -> str:
    """What carving costs in quality, and what training puts back."""
    rows, notes = [], []
    for device in ("cuda", "cpu"):
        part = result_of("width").get(f"quality on {device}")
        if part is None:
            continue
        for run in part["runs"]:
            rows.append(
                [
                    f"`{_recipe(run)}`",
                    "GPU" if device == "cuda" else "CPU",
                    f"{run['seconds']:.0f}",
                    f"{run['perplexity']:.2f}",
                    f"{run['times_dense']:.3f}",
                    f"{run['piqa']:.1%}" if "piqa" in run else "-",
                    f"{run['experts_run']:.2f}" if "experts_run" in run else "-",
                ]
            )
        # The recipes are in the rows.
        part = {**part, "command": part["command"].partition(" --recipe")[0]}
        piqa = f", PIQA {part['dense']['piqa']:.1%}," if "piqa" in part["dense"] else ""
        notes.append(
            f"{measured_on(part, 'torch', 'transformers')} The dense model has perplexity "
            f"{part['dense']['perplexity']:.2f}{piqa} on {part['windows']} windows of 2,048 tokens "
            f"of {part['text']}; learnt from at most {part['learnt_tokens']:,} tokens of "
            f"{part['calib']}."
        )
    head = [
        "recipe", "", "seconds", "perplexity", "times the dense model's", "PIQA",
        "experts a token ran",
    ]  # fmt: skip
    return "\n\n".join([markdown_table(head, rows), *notes])


def width_choices() -> str:
    """What each way to choose a token's neurons costs on a GPU, untrained and tuned."""
    result = result_of("width")["quality on cuda"]
    found = {_recipe(run): run for run in result["runs"]}

    def cell(options: str, behind: str) -> str:
        run = found[f"carve-moe{{{options}}}{behind}"]
        more = run.get("experts_run", 0) - int(options.partition("active=")[2].partition(",")[0])
        answers = f", PIQA {run['piqa']:.1%}" if "piqa" in run else ""
        experts = f" (+{more:.2f} experts)" if more > 0.005 else ""
        return f"{run['times_dense']:.2f}{experts}{answers}"

    rows = []
    for shared, active, experts in ((3, 3, 8), (2, 2, 16)):
        routed = f"shared={shared},active={active},experts={experts}"
        alike = f"shared={shared + active},active=0,experts={experts}"
        for behind in ("", ",tune-moe{seconds=45,generated_windows=0}"):
            rows.append(
                [
                    f"{shared + active} of {experts} groups" + (", tuned" if behind else ""),
                    cell(alike, behind),
                    cell(routed, behind),
                    cell(f"{routed},layerwise_budget=true", behind),
                    cell(f"{routed},threshold=true", behind),
                ]
            )
    head = ["times the dense model's perplexity", "the same for all tokens", "a router", "by layer"]
    ffn = result_of("width")["ffn on cuda"]
    shares = [f"{row['share']:.2f}" for row in ffn["rows"] if row["tokens"] == 4096]
    note = (
        f"Tuned for 45 s by {result['learnt_tokens']:,} tokens of {result['calib']}. A part of "
        f"{ffn['shape']}'s shape takes {' and '.join(shares)} of the dense one's time there, for a "
        f"prompt of 4,096 tokens."
    )
    part = {**result, "command": result["command"].partition(" --recipe")[0]}
    measured = measured_on(part, "torch", "transformers")
    return f"{markdown_table([*head, 'thresholds'], rows)}\n\n{measured} {note}"


def width_ffn() -> str:
    """What a carved part takes on a GPU, beside the dense one."""
    result = result_of("width")["ffn on cuda"]
    splits = list(dict.fromkeys(row["split"] for row in result["rows"]))
    found = {(row["split"], row["tokens"]): row for row in result["rows"]}
    rows = []
    for tokens in dict.fromkeys(row["tokens"] for row in result["rows"]):
        cells = [f"{tokens:,}", f"{median(found[splits[0], tokens]['microseconds']['dense']):.0f}"]
        for split in splits:
            row = found[split, tokens]
            cells.append(f"{median(row['microseconds']['carved']):.0f} ({row['share']:.2f})")
        rows.append(cells)
    head = ["tokens", "dense, µs", *(f"{split}, µs (share)" for split in splits)]
    launches = {
        form: [
            median(row["host_microseconds"][form])
            for row in result["rows"]
            if "host_microseconds" in row
        ]
        for form in ("dense", "carved")
    }
    host = ", ".join(
        f"{min(found):.0f} to {max(found):.0f} µs for a {form} part"
        for form, found in launches.items()
    )
    shape = result_of("width")["shape on cuda"]
    note = (
        f"A part of {result['shape']}'s shape, {result['dtype']}; up to 64 tokens recorded as "
        f"graphs, more launched one by one, the host ahead of the GPU. To launch it takes the host "
        f"{host}. A whole Llama-7B of random weights is carved in "
        f"{shape['seconds']:.0f} s, with {shape['peak_bytes'] / 1e9:.1f} GB of the GPU's memory "
        f"at most."
    )
    return f"{markdown_table(head, rows)}\n\n{measured_on(result, 'torch')} {note}"


def volta() -> str:
    """The machine code of the Volta kernels beside what Triton 3.1.0 makes."""
    result = result_of("volta")
    rows = [
        [
            f"{row['phase']}, D {row['head_dim']}",
            _tile(row),
            f"{row['hmma']:,}",
            str(row["registers"]),
            f"{row['spilled_bytes']:,}",
            str(row["two_byte_stores"]),
            f"{row['shared_bytes']:,}",
        ]
        for row in result["ours"]
    ]
    rows += [
        [
            f"Triton, {row['form']}",
            _tile(row),
            f"{row['hmma']:,}",
            str(row["registers"]),
            f"{row['spilled_bytes']:,}",
            str(row["two_byte_stores"]),
            f"{row['shared_bytes']:,}",
        ]
        for row in result["triton"]
        if row["form"] in ("D 64", "D 128", "D 256")
    ]
    head = [
        "causal, f16", "tile, warps", "HMMA.884", "registers", "bytes spilled",
        "2-byte stores to shared memory", "bytes of shared memory",
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{measured_on(result, 'nvrtc', 'triton')}"


def _tile(row: dict[str, Any]) -> str:
    m, n, warps = row["tile"]
    return f"{m} x {n}, {warps}"


def volta_model() -> str:
    """What the issue model says of the published kernel, for each length it may be fitted to."""
    model = result_of("volta")["model"]
    lengths = list(model["published_tflops"])
    rows = [["published", *(f"{model['published_tflops'][name]:.1f}" for name in lengths)]]
    for fitted in sorted(model["fits"], key=lambda f: int(f) != model["fitted_length"]):
        fit = model["fits"][fitted]
        cells = [
            f"{fit['tflops'][name]:.1f}"
            + (f" ({fit['error'][name]:+.0%})" if name != fitted else "")
            for name in lengths
        ]
        rows.append([f"fitted to {fitted}, x {fit['factor']:.2f}", *cells])
    return markdown_table(["TFLOP/s", *lengths], rows)


def volta_predicted() -> str:
    """What the issue model predicts for our kernels, with what its fits span."""
    predicted = result_of("volta")["predicted"]
    lengths = list(predicted[0]["tflops"])
    rows = [
        [
            f"D {row['head_dim']}",
            *(
                f"{row['tflops'][n]:.0f} ({row['span'][n][0]:.0f} to {row['span'][n][1]:.0f})"
                for n in lengths
            ),
        ]
        for row in predicted
    ]
    return markdown_table(["TFLOP/s", *lengths], rows)


TABLES: dict[str, Callable[[], str]] = {
    "attention": attention,
    "attention_sweep": attention_sweep,
    "beginnings": beginnings,
    "bits": bits,
    "bits_kernels": bits_kernels,
    "int4_onnx": int4_onnx,
    "decode": decode,
    "demo": demo,
    "families": families,
    "forms": forms,
    "kv": kv,
    "kv_onnx": kv_onnx,
    "host_attention": host_attention,
    "host_choices": host_choices,
    "host_model": host_model,
    "kv_speed": kv_speed,
    "allocation": allocation,
    "allocation_greedy": allocation_greedy,
    "data_parallel": data_parallel,
    "arena": arena,
    "quality": quality,
    "scale": scale,
    "shard": shard,
    "volta": volta,
    "generation": generation,
    "depth": depth,
    "depth_parts": depth_parts,
    "depth_speed": depth_speed,
    "width": width,
    "width_choices": width_choices,
    "width_ffn": width_ffn,
    "width_onnx": width_onnx,
    "volta_model": volta_model,
    "volta_predicted": volta_predicted,
    "models": models,
    "models_answers": models_answers,
    "models_choice": models_choice,
    "memory_capacity": memory_capacity,
    "memory_events": memory_events,
    "memory_overhead": memory_overhead,
    "memory_paper": memory_paper,
    "memory_paper_addresses": memory_paper_addresses,
    "memory_passes": memory_passes,
    "memory_peaks": memory_peaks,
    "onnx_memory": onnx_memory,
    "sums": sums,
    "sums_of_attention": sums_of_attention,
    "sums_of_few": sums_of_few,
    "sums_of_attention_predicted": sums_of_attention_predicted,
    "sums_predicted": sums_predicted,
    "vision": vision,
    "vision_families": vision_families,
}


def render(text: str) -> str:
    """Return a page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end table -->"

    return _TABLE.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say what is out of date")
    args = parser.parse_args()
    stale = False
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        fresh = render(text)
        if fresh == text:
            continue
        stale = True
        if args.check:
            print(f"{name} is out of date: run `python tools/tables.py`")
        else:
            page.write_text(fresh, encoding="utf-8")
            print(f"{name} written")
    sys.exit(1 if stale and args.check else 0)


if __name__ == "__main__":
    main()
