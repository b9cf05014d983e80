"""The text of `model.py`: one file that runs a program with PyTorch alone."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection

from graphopt.errors import LoweringError
from graphopt.ir import functional
from graphopt.ir.context import rotary_switch
from graphopt.ir.dataflow import mask_is_for_attention_alone
from graphopt.ir.graph import Function, Node, Program, resolve_attrs
from graphopt.ir.ops.attention import ATTENTIONS
from graphopt.ir.ranks import is_sharded
from graphopt.ir.shapes import infer_program
from graphopt.lowering.torch import (
    load_template,
    packed,
    ranks,
    sees_template,
    step_template,
    template,
)
from graphopt.lowering.torch.cache_text import reads_present
from graphopt.lowering.torch.classes import ModuleClass
from graphopt.lowering.torch.head import head_text
from graphopt.lowering.torch.lowered_kernels import lower_attentions
from graphopt.lowering.torch.model import ModelClass
from graphopt.lowering.torch.passes import lower
from graphopt.lowering.torch.sees import Sees
from graphopt.lowering.torch.text import HELPERS, class_name
from graphopt.runtime import chat
from graphopt.support.plain import plain_text_source


def render_model(program: Program, target: str = "cpu", lowered: Program | None = None) -> str:
    """Return the text of `model.py` for a program on a target.

    Args:
        lowered: What `lower` makes of the program for the target, if that is at hand.

    It depends on nothing that `program.json` leaves out, nor on the dtype of a weight, which
    another emitter may change: a program that was saved gives the same text when it is loaded
    again. No weight is read.

    Raises:
        LoweringError: An op, an attribute or an input has no form in the file.
    """
    lowered = lower(program, target) if lowered is None else lowered
    kernels = lower_attentions(lowered, target)
    if kernels is None:
        _check_layouts(program)
    sees = Sees.of(program)
    classes = _classes(lowered, both_ways=sees is not None and sees.both_ways)
    ahead = kernels.functions() if kernels is not None else []
    unmasked, with_kernels = mask_is_for_attention_alone(program), kernels is not None
    of_ranks = is_sharded(program)
    whole = ModelClass(
        lowered,
        classes,
        unmasked=unmasked,
        with_kernels=with_kernels,
        agreed=of_ranks and not ranks.logits_gathered(lowered),
        sees=sees,
    )
    model = "\n".join(whole.lines())
    parts = ["\n".join(made.lines()) for made in classes.values()]
    if "under(" in model:
        parts.append(load_template.UNDER.strip())
    helpers = {name for made in classes.values() for name in made.body.helpers}
    if whole.agreed:
        helpers.add("agreed")
    if packed.CLASS_NAME in helpers.difference(ahead):
        parts.insert(0, packed.CLASS.strip())
        helpers.add("dequantise")
    if whole.last_alone:
        parts.append(template.AT.strip())
    if " = pack(" in "".join(parts):
        parts.append(load_template.PACK.strip())
    used = [name for name in ahead if name in helpers]
    steps = _steps(program, classes, unmasked and with_kernels, whole.last_alone)
    if kernels is not None and "kernels.Decoder" not in steps:
        check_fixed_room(program)
    in_arena = has_arena(steps)
    apart = kernels is not None or whole.caches.has_policies or of_ranks or sees is not None
    body = [
        "# What the layers are made of.",
        *([template.PACKAGE.strip()] if apart else []),
        *([template.kernels(kernels.device, used).strip()] if kernels else []),
        *([template.POLICIES.strip()] if whole.caches.has_policies and not kernels else []),
        *([template.RANKS.strip(), "\n".join(ranks.split_lines(program))] if of_ranks else []),
        *ranks.functions(helpers.difference(ahead)),
        *_sources(helpers.difference(ahead)),
        "# The layers.",
        *parts,
        model,
        "# Loading and running.",
        *([load_template.OWN_PART.strip()] if of_ranks else []),
        load_template.load(with_kernels, of_ranks).strip(),
        *([template.PACKAGE.strip()] if in_arena and not apart else []),
        steps,
        *_generate(program, steps, sees, in_arena, of_ranks),
        inspect.getsource(chat.render_chat).strip(),
        inspect.getsource(chat.rendered_chat).strip(),
        inspect.getsource(chat.chat_text).strip(),
        template.PROMPT.strip(),
        plain_text_source().strip(),
        template.main(with_kernels, in_arena, of_ranks, sees=sees is not None).strip(),
    ]
    text = "\n\n\n".join(body)
    return f"{head_text(program, text, kernels)}\n\n\n{text}\n"


def _check_layouts(program: Program) -> None:
    """Refuse states whose layout `model.py` in plain PyTorch does not have.

    Raises:
        LoweringError: Naming the state and what the file has in its place.
    """
    for state in program.states.values():
        if state.layout.kind == "paged":
            raise LoweringError(
                f"State {state.name!r} is {state.layout}, and model.py in plain PyTorch keeps keys "
                "contiguous or in a ring.",
                "Keep this state contiguous, or emit for a GPU.",
            )


def _steps(
    program: Program, classes: dict[str, ModuleClass], fixed_room: bool, last_alone: bool
) -> str:
    """Return `steps`: with a cache of fixed room where nothing asks how full it is.

    Args:
        fixed_room: The file has such caches, and needs no mask for them.
        last_alone: See `ModelClass`.
    """
    if not program.states:
        return step_template.UNCACHED.format(why="This model has no cache").strip()
    sizes = any("P" in made.body.needs for made in classes.values())
    if fixed_room and not sizes and _causal(program) and not _reads_caches(classes):
        sees = Sees.of(program) is not None
        return step_template.static(arena_refused(program) is None, last_alone, sees=sees)
    if any("attention_mask" in call.args for call in program.calls):
        rings = [state.layout.ring for state in program.states.values()]
        return step_template.growing(rings, arena_refused(program) is None)
    why = "This model has no mask that tells padding from text"
    return step_template.UNCACHED.format(why=why).strip()


def _generate(
    program: Program, steps: str, sees: Sees | None, in_arena: bool, of_ranks: bool
) -> list[str]:
    """Return `generate`, and what it needs for prompts of embeddings.

    Args:
        steps: The text of what takes steps behind token ids.
    """
    if sees is None:
        return [template.generate(rotary_switch(program), in_arena, of_ranks).strip()]
    kind = "growing" if program.states else "uncached"
    kind = "static" if "kernels.Decoder" in steps else kind
    return [
        sees_template.TOWER.strip(),
        sees_template.steps_behind(kind),
        sees_template.generate(sees.width, sees.axes, sees.both_ways, in_arena).strip(),
    ]


def check_fixed_room(program: Program) -> None:
    """Refuse keys in the host's memory in a model whose caches cannot have fixed room.

    Raises:
        LoweringError: Some of a state's keys are on the host.
    """
    if any(state.host for state in program.states.values()):
        raise LoweringError(
            f"{program.name} has keys in the host's memory, in caches of fixed room, and something "
            "in it besides attention asks how full a cache is or reads its keys.",
            "Leave place-kv out.",
        )


def arena_refused(program: Program) -> str | None:
    """Return why steps of a program have no arena; None if they may have one."""
    if not program.states:
        return "there is no KV cache: every step runs every text again, each of another length"
    if any(state.policy for state in program.states.values()):
        return "policies of its KV cache remember what steps read: a step cannot be run twice"
    if any(state.host for state in program.states.values()):
        return "keys in the host's memory are written in a step: it cannot be run twice"
    if any(state.layout.kind == "paged" for state in program.states.values()):
        return "pages of its KV cache are put together anew in every step"
    return None


def has_arena(text: str) -> bool:
    """Return whether steps in the text of a `model.py` may have an arena."""
    return "def arena_for(" in text


def _reads_caches(classes: dict[str, ModuleClass]) -> bool:
    """Return whether anything but attention reads keys or values of a cache."""
    return any(
        reads_present(made.function, cache) or made.body.apart
        for made in classes.values()
        for cache in made.function.caches
    )


def _causal(program: Program) -> bool:
    """Return whether no token sees a later one."""
    return all(
        resolve_attrs(node, call)["causal"]
        for call in program.calls
        for node in program.functions[call.function].nodes
        if node.op in ATTENTIONS
    )


def _classes(program: Program, *, both_ways: bool = False) -> dict[str, ModuleClass]:
    """Return the class of every function that is called, in order of the first call.

    Args:
        program: As it is emitted.
        both_ways: Tokens of one picture see each other both ways.
    """
    per_call, _ = infer_program(program)
    classes: dict[str, ModuleClass] = {}
    taken = {"Model", packed.CLASS_NAME}
    for name in dict.fromkeys(call.function for call in program.calls):
        function = program.functions[name]
        numbers = [n for n, call in enumerate(program.calls) if call.function == name]
        calls = [program.calls[n] for n in numbers]
        unique = class_name(name, taken)
        taken.add(unique)
        classes[name] = ModuleClass(
            unique,
            function,
            calls,
            [[per_call[n][value] for value in function.params] for n in numbers],
            [[per_call[n][value] for value in function.results] for n in numbers],
            _addends(function),
            packed.encodings(program, calls[0]),
            both_ways=both_ways,
        )
    return classes


def _addends(function: Function) -> list[int]:
    """Return the parameters that are only added where a norm takes the sum: they may be None."""
    uses = function.uses()
    return [
        place
        for place, param in enumerate(function.params)
        if uses[param]
        and param not in function.outside_values()
        and all(_adds(node) and index == 1 for node, index in uses[param])
    ]


def _adds(node: Node) -> bool:
    """Return whether an op adds its second operand to the first and takes the norm of the sum."""
    joined = ("add_rms_norm", "norm_packed_linear")
    transforms = ("transformed", "transformed_packed_linear")
    return node.op in joined or (node.op in transforms and "total" in node.attrs)


def _sources(helpers: Collection[str]) -> list[str]:
    """Return the source of runtime functions and of those they call, callees first."""
    found: dict[str, str] = {}

    def visit(name: str) -> None:
        source = inspect.getsource(getattr(functional, name)).strip()
        calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        called = {callee.id for callee in calls if isinstance(callee, ast.Name)}
        for other in HELPERS:
            if other in called and other != name and other not in found:
                visit(other)
        found[name] = source

    for name in HELPERS:
        if name in helpers and name not in found:
            visit(name)
    return list(found.values())
