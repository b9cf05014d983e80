"""Opening a model or an artifact to run it."""

from __future__ import annotations

from pathlib import Path

from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.backends.placement import Backend, Placement, place, weight_bytes
from graphopt.backends.torch_artifact import TorchArtifactModel, is_for_gpu
from graphopt.errors import SourceError, UsageError
from graphopt.execute.language_model import LanguageModel, ProgramModel
from graphopt.files.confined import folder_inside
from graphopt.ir.context import context_length
from graphopt.ir.graph import Program
from graphopt.ir.ranks import group_of
from graphopt.sources.base import output_tokenizer
from graphopt.support.devices import AUTO, usable_device
from graphopt.support.launched import launched


def open_language_model(
    spec: str,
    backend: Backend = "auto",
    *,
    device: str = AUTO,
    trust_remote_code: bool = False,
    keep_weights: bool = True,
    offload: bool = False,
    by_layer: bool = False,
) -> LanguageModel:
    """Open a model or an artifact to run it.

    Args:
        spec: What `open_model` takes, an output folder of `graphopt compile`, or a folder with
            `model.onnx`.
        backend: "auto" runs an output folder's model.py where it has one, else on a CPU its ONNX
            graph, else its program; everything else is captured and run as a program.
        device: Such as `cpu`, `cuda` or `cuda:1`. "auto" takes a GPU where there is one and the
            weights have room in its memory, but for ONNX, which runs on the CPU.
        trust_remote_code: Let code of a checkpoint, or a changed model.py, run.
        keep_weights: See `ProgramModel`.
        offload: Keep keys and values in host memory, where a model.py for a GPU has layers with a
            KV policy, and bring to the device what a step reads.
        by_layer: Let a program whose weights have no room on a GPU run there a layer at a time,
            which suits texts that are read at once.

    Raises:
        SourceError: There is no such model, or it cannot be read.
        CaptureError: The source cannot be captured.
        UsageError: The backend is not among what the folder holds, or does not run on the device;
            or it cannot have its keys in host memory.
        GraphoptError: The device cannot be used here.
    """
    on_gpu = device != AUTO and usable_device(device).type != "cpu"
    root = Path(spec).expanduser()
    artifact = (root / "program.json").is_file()
    onnx_folder = (folder_inside(root, "onnx") or root / "onnx") if artifact else root
    has_torch = artifact and (root / "model.py").is_file()
    has_onnx = (onnx_folder / "model.onnx").is_file()
    if backend == "auto":
        wants_program = on_gpu and artifact
        backend = "torch" if has_torch else "onnx" if has_onnx and not wants_program else "program"
    for name, there in (("torch", has_torch), ("onnx", has_onnx)):
        if backend == name and not there:
            raise UsageError(
                f"{spec!r} holds no {name} artifact.",
                f"Compile one with `graphopt compile {spec} --emit {name} -o FOLDER`.",
            )
    if backend == "onnx" and not artifact:
        placement = place(device, backend, 0)
        if offload:
            _check_offload(None, backend, placement)
        return _placed(OnnxArtifactModel(onnx_folder), placement)
    from graphopt.capture import capture

    program = capture(spec, trust_remote_code=trust_remote_code)
    if not program.has_values():
        raise SourceError(
            f"{program.name} is a config without weights, and nothing can be computed without.",
            "Give a model folder, a .gguf file or 'demo'; `graphopt inspect` takes a config.",
        )
    itemsize = 2 if backend == "torch" and is_for_gpu(root) else 4
    # A program is run as one of simulated ranks in this process.
    ranks = len(group_of(program)) if backend == "torch" else 0
    if ranks and launched() is not None:
        raise UsageError(
            f"The model is split over {ranks} devices, for which graphopt starts ranks, and this "
            "process is a rank already.",
            "Run one graphopt, without --ranks and torchrun; or, without graphopt, `torchrun "
            f"--nproc-per-node {ranks} {root / 'model.py'}`.",
        )
    placement = place(device, backend, weight_bytes(program, itemsize), ranks, by_layer)
    if offload:
        _check_offload(program, backend, placement)
    model: LanguageModel
    if backend == "torch":
        model = TorchArtifactModel(
            root,
            program,
            device=placement.device,
            trust_remote_code=trust_remote_code,
            offload=offload,
        )
    elif backend == "onnx":
        model = OnnxArtifactModel(
            onnx_folder,
            name=program.name,
            config=program.config,
            generation=program.generation,
            tokenizer=output_tokenizer(root, program),
            constants=[weight.name for weight in program.weights if weight.constant],
            length=context_length(program),
        )
    else:
        kept = keep_weights and not placement.by_layer
        model = ProgramModel(program, keep_weights=kept, device=placement.device)
    held = (state.policy for state in program.states.values())
    model.kv_policies = tuple(sorted({policy.kind for policy in held if policy is not None}))
    return _placed(model, placement)


def _check_offload(program: Program | None, backend: Backend, placement: Placement) -> None:
    """Refuse keys in host memory where they have no meaning.

    Raises:
        UsageError: With the reason.
    """
    reason = None
    if placement.device.type != "cuda":
        reason = "a GPU reads them there, and the model runs on the CPU"
    elif backend != "torch":
        reason = f"a model.py for a GPU has them, and the model runs as {backend}"
    elif program is None or not any(state.policy for state in program.states.values()):
        reason = "a KV policy says which of them a step needs, and no layer has one"
    if reason is not None:
        raise UsageError(
            f"Keys in host memory (--offload): {reason}.",
            "Leave it out, or compile for a GPU with attach-kv-policy among the passes.",
        )


def _placed(model: LanguageModel, placement: Placement) -> LanguageModel:
    """Return the model, which says where it runs."""
    model.placement = placement.sentence(model.backend)
    return model
