"""How a user runs a checkpoint."""

from __future__ import annotations

from graphopt.ir.graph import Program, resolve_attrs


def transformers_line(program: Program, *, trust: bool, packed: bool, dequantised: bool) -> str:
    """Return a command that runs the checkpoint of a program by transformers alone.

    Args:
        trust: It brings a class that a user has to allow to run.
        packed: It holds packed weights.
        dequantised: They are made dense when it is loaded.
    """
    imports, options = "", ", trust_remote_code=True" if trust else ""
    arguments: list[str] = []
    if dequantised:
        imports = ", CompressedTensorsConfig"
        arguments.append("quantization_config=CompressedTensorsConfig(dequantize=True)")
    if _caps_scores(program):
        # Old versions of transformers leave the cap out in their default attention.
        arguments.append("attn_implementation='eager'")
    config = ", ".join(arguments)
    if program.vision is not None:
        options += f", {config}" if config else ""
        code = (
            f"import sys, torch; from transformers import AutoModelForImageTextToText{imports}; "
            f"model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]{options}); "
            "print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=16, do_sample=False))"
        )
    elif program.tokenizer is None:
        options += f", {config}" if config else ""
        code = (
            f"import sys, torch; from transformers import AutoModelForCausalLM{imports}; "
            f"model = AutoModelForCausalLM.from_pretrained(sys.argv[1]{options}); "
            "print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=16, do_sample=False))"
        )
    else:
        options += f", model_kwargs=dict({config})" if config else ""
        code = (
            f"import sys; from transformers import pipeline{imports}; "
            f"write = pipeline('text-generation', sys.argv[1]{options}); "
            "[answer] = write('Hello', do_sample=False, max_new_tokens=64); "
            "print(answer['generated_text'])"
        )
    needs = "transformers, compressed-tensors" if packed else "transformers"
    return f'python -c "{code}" {{out}}/hf   # needs {needs}'


def _caps_scores(program: Program) -> bool:
    """Return whether an attention of the program bounds its scores."""
    return any(
        resolve_attrs(node, call).get("softcap") is not None
        for call in program.calls
        for node in program.functions[call.function].nodes
        if node.op == "attention"
    )
