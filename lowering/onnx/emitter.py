"""The ONNX emitter: one graph for prefill and decode, straight from the IR."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import torch

from graphopt.errors import LoweringError, UsageError
from graphopt.files.onnx_file import EMBEDDING_NAME, MODEL_NAME, VISION_NAME
from graphopt.files.safetensors import WEIGHTS_NAME
from graphopt.ir.graph import Program
from graphopt.ir.ops import is_aten
from graphopt.ir.shapes import infer_program
from graphopt.ir.weights import Weight
from graphopt.lowering.base import (
    NOTHING,
    Emitted,
    Emitter,
    StoredTensor,
    check_attentions,
    check_no_hosts,
)
from graphopt.lowering.onnx.external import DataFile, Layout, SafetensorsDataFile
from graphopt.lowering.onnx.genai import GENAI_NAME, RUN_NAME, genai_config, run_script, why_not
from graphopt.lowering.onnx.genai_vision import (
    vision_sections,
    why_text_alone,
    with_vision,
    write_processor,
)
from graphopt.lowering.onnx.graph import Graph
from graphopt.lowering.onnx.kv_policies import refusal
from graphopt.lowering.onnx.ops import translation_of
from graphopt.lowering.onnx.quantised import block_of, no_onnx_form
from graphopt.lowering.onnx.sighted import Parts, parts_of, write_tower
from graphopt.lowering.onnx_accuracy import EXACT
from graphopt.lowering.tokenizer import (
    picture_lines,
    picture_prompt,
    run_lines,
    write_generation,
    write_tokenizer,
)
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.progress import Progress


class OnnxEmitter(Emitter):
    """Writes `onnx/model.onnx`, its data file, and what onnxruntime-genai needs beside them.

    Args:
        moe: Experts become com.microsoft::MoE, where its kernel computes what they are.
        policy_op: Attention with a KV policy becomes an operator of the domain `graphopt`.
        shared: The data file is a safetensors file with weights as the program has them, [out, in]
            under their names, so that the torch form reads the same file.
        accuracy_level: MatMulNBits' for products with packed weights: 1 for fp32, 4 to round what
            they are multiplied with to 8 bits, which is faster.
    """

    name: ClassVar[str] = "onnx"

    def __init__(
        self,
        *,
        moe: bool = False,
        policy_op: bool = False,
        shared: bool = False,
        accuracy_level: int = EXACT,
    ) -> None:
        self.moe, self.shared, self.accuracy_level = moe, shared, accuracy_level
        self.policy_op = policy_op

    def check(self, program: Program, target: str) -> None:
        """Refuse a program with an op, an encoding or a layout that has no ONNX form.

        Raises:
            LoweringError: Naming the op and the call, the weight, or the state.
        """
        check_no_hosts(program, "A graph")
        for state in program.states.values():
            if state.layout.kind != "contiguous":
                raise LoweringError(
                    f"State {state.name!r} is {state.layout}, and a graph takes and gives keys one "
                    "behind the other.",
                    "Keep this state contiguous, or emit torch instead (--emit torch).",
                )
            reason = None if state.policy is None else refusal(state.policy)
            if reason is not None:
                raise LoweringError(
                    f"State {state.name!r} has a policy: {reason}.",
                    "Attach one of those, or emit torch instead (--emit torch).",
                )
        for weight in program.used_weights():
            reason = None if weight.encoding is None else no_onnx_form(weight.encoding)
            if reason is not None:
                raise LoweringError(
                    f"Weight {weight.name!r} is {weight.encoding}: {reason}.",
                    "Emit torch instead (--emit torch).",
                )
        check_attentions(program, "an ONNX graph")
        for call in program.calls:
            function = program.functions[call.function]
            for node in function.nodes:
                if translation_of(node.op) is None:
                    where = call.path or function.name
                    kind = "ATen operator" if is_aten(node.op) else "op"
                    raise LoweringError(
                        f"{where}: {node.outputs[0].name} = {node.op}: this {kind} has no ONNX "
                        "form.",
                        "Emit torch instead (--emit torch), or add a form under "
                        "lowering/onnx/ops/.",
                    )

    def without_pictures(self, program: Program) -> str | None:
        return None  # `emit` says it, by what it could write

    def stored_dtype(self, program: Program, weight: Weight, target: str) -> torch.dtype:
        return Layout((weight,)).dtype

    def tensors(self, program: Program, target: str) -> dict[str, StoredTensor]:
        used = {t.name for weight in program.used_weights() for t in weight.tensors()}
        layout = "" if self.shared else "model.onnx.data/"
        planned = {
            layout + name: stored
            for name, stored in super().tensors(program, target).items()
            if name in used
        }
        for weight in program.used_weights():
            block = None if weight.encoding is None else block_of(weight.encoding)
            if block is not None and weight.encoding is not None and block < weight.encoding.group:
                # Blocks that are parts of a group repeat its scale, beside the group's own.
                rows, length = weight.shape
                kind = (rows, length // block), torch.float32
                planned[f"{layout}{weight.name}.scales.blocks_of_{block}"] = kind
        return planned

    def emit(
        self,
        program: Program,
        root: Path,
        target: str,
        progress: Progress,
        stored: Mapping[str, StoredWeight] = NOTHING,
    ) -> Emitted:
        folder = root / "onnx"
        folder.mkdir(parents=True, exist_ok=True)
        data = self._data_file(program, folder, root)
        notes, parts = _parts(program)
        graphs: dict[str, Graph] = {}

        def add(name: str, part: Program, continues: bool = True) -> None:
            graphs[name] = Graph(
                part, data,
                continues=continues, moe=self.moe, policy_op=self.policy_op,
                as_stored=self.shared, accuracy_level=self.accuracy_level,
                by_rows=() if parts is None else [w.name for w in parts.embedding.weights],
            )  # fmt: skip

        if parts is not None:
            add(EMBEDDING_NAME, parts.embedding)
        add(MODEL_NAME, program if parts is None else parts.decoder)
        reason = why_not(program)
        sections = None if parts is None or reason is not None else vision_sections(program, parts)
        if reason is None:
            add(GENAI_NAME, parts.decoder if parts is not None and sections else program, False)
        models = {name: graph.build() for name, graph in graphs.items()}
        data.write(progress)
        for name, model in models.items():
            ir.save(model, folder / name)
        emitted = Emitted([*(folder / name for name in models), data.path], data.storage)
        emitted.usage += run_lines(program)
        if parts is not None and parts.tower is not None:
            files, places = write_tower(parts.tower, folder, root, progress)
            emitted.files += files
            emitted.storage |= places
        if self.moe:
            emitted.fallbacks += graphs[MODEL_NAME].plain()
            if not graphs[MODEL_NAME].fused and not emitted.fallbacks:
                emitted.notes.append(("onnx", "there are no experts for com.microsoft::MoE"))
        files, told = write_tokenizer(program, folder)
        emitted.files += [*files, *write_generation(program, folder)]
        emitted.notes += [*told, *notes]
        if parts is not None and parts.tower is not None:
            emitted.usage += picture_lines(
                "graphopt generate {out} --backend onnx",
                picture_prompt(folder, [path.name for path in files]),
                "pillow",
            )
        if reason is not None:
            emitted.notes.append(("onnx", f"no genai_config.json: {reason}"))
            return emitted
        in_place = graphs[GENAI_NAME].in_place
        emitted.files += self._genai(program, folder, in_place, sections)
        if sections is None and parts is not None:
            emitted.notes.append(("onnx", why_text_alone(program, parts)))
        emitted.usage.append(
            f"python {{out}}/onnx/{RUN_NAME} --prompt 'Hello'   # needs onnxruntime-genai"
        )
        return emitted

    def _data_file(self, program: Program, folder: Path, root: Path) -> DataFile:
        if self.shared:
            return SafetensorsDataFile(folder / WEIGHTS_NAME, root, program.weights.tensors())
        return DataFile(folder / "model.onnx.data", root)

    @staticmethod
    def _genai(
        program: Program, folder: Path, in_place: bool, sections: Mapping[str, Any] | None
    ) -> list[Path]:
        kinds, _ = infer_program(program)
        heads = 0
        for call, types in zip(program.calls, kinds, strict=True):
            for node in program.functions[call.function].nodes:
                if node.op == "attention" and node.inputs[0] is not None:
                    heads = int(types[node.inputs[0]].shape[1])
        config = folder / "genai_config.json"
        entries = genai_config(program, heads, in_place)
        files = []
        if sections is not None:
            with_vision(entries, sections)
            files = write_processor(program, folder)
        config.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
        script = folder / RUN_NAME
        script.write_text(run_script(), encoding="utf-8", newline="\n")
        return [config, script, *files]


def _parts(program: Program) -> tuple[list[tuple[str, str]], Parts | None]:
    """Return the parts of a program that sees, and notes on what of it takes no pictures."""
    if program.vision is None:
        return [], None
    try:
        parts = parts_of(program)
    except UsageError as error:
        return [("onnx", f"it takes token ids alone. {error.message}")], None
    if parts.tower is None:
        return [("onnx", f"no {VISION_NAME}: {parts.reason}")], parts
    return [], parts
