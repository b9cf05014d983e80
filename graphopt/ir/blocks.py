"""The repeated blocks of a program, their sub-blocks, and taking them out.

A block is a call that takes the residual stream and gives it back in the same shape. A sub-block
is a term that is added to the stream inside one: an attention, or a feed-forward part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from graphopt.ir.dataflow import region
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import Call, Function, Node, Param, Program, Value, unique_name
from graphopt.ir.layer_config import decoder_config, shrink_config
from graphopt.ir.ops.attention import ATTENTIONS
from graphopt.ir.shapes import infer_program

NO_BLOCK = "it is no block of the residual stream, or behind a layer that is none"
"""Why passes on blocks leave a layer alone: it gives keys and values to others, for one."""


@dataclass(frozen=True)
class Block:
    """A call that changes the residual stream.

    Attributes:
        position: The position of the call in the program.
        stream: Which of its arguments is the stream; its only result is the stream behind it.
    """

    position: int
    stream: int


def find_blocks(program: Program) -> list[Block]:
    """Return the blocks in order of execution.

    Calls behind the first block that are no blocks themselves end the list: the head. The dtype of
    a stream may change: operators that are kept as they were traced say fp32 of it, whatever the
    checkpoint's is.
    """
    kinds, _ = infer_program(program)
    found: list[Block] = []
    latest: str | None = None
    for position, (call, types) in enumerate(zip(program.calls, kinds, strict=True)):
        function = program.functions[call.function]
        stream = None
        if len(function.results) == 1:
            wanted = types[function.results[0]]
            places = [
                i
                for i, param in enumerate(function.params)
                if types[param].shape == wanted.shape and types[param].dtype.is_floating_point
            ]
            if latest is not None:
                places = [i for i in places if call.args[i] == latest]
            if len(places) == 1 and wanted.dtype.is_floating_point:
                stream = places[0]
        if stream is None:
            if found:
                break
            continue
        found.append(Block(position, stream))
        latest = call.results[0]
    return found


def layer_calls(program: Program) -> list[int]:
    """Return the positions of a program's layers: blocks, and all but its embedding and its head.

    The embedding reads the token ids; the head gives the outputs.
    """
    blocks = {block.position for block in find_blocks(program)}
    return [
        position
        for position, call in enumerate(program.calls)
        if position in blocks
        or ("input_ids" not in call.args and not set(call.results) & set(program.outputs))
    ]


def with_own_functions(program: Program) -> Program:
    """Return a copy of a program whose blocks apply functions that no other call does.

    What a pass puts into the functions of blocks would else change a projection in front of the
    head that is a layer's function again (Gemma 3n).
    """
    result = program.copy()
    blocks = {block.position for block in find_blocks(result)}
    others = {call.function for at, call in enumerate(result.calls) if at not in blocks}
    for name in {result.calls[at].function for at in blocks} & others:
        own = unique_name(name, set(result.functions))
        result.functions[own] = result.functions[name].clone(own)
        for at in blocks:
            if result.calls[at].function == name:
                result.calls[at].function = own
    return result


def block_name(program: Program, block: Block) -> str:
    """Return what a block is called in messages: its module path, or its place."""
    call = program.calls[block.position]
    return call.path or f"{call.function} at {block.position}"


def private_results(program: Program, blocks: Sequence[Block]) -> str | None:
    """Return why the blocks cannot be taken out one by one, or None.

    A block's result may be read by the next call alone.
    """
    # A name may be bound again by a later call, and means the latest.
    maker: dict[str, int] = {}
    readers: dict[int, int] = {}
    for position, call in enumerate(program.calls):
        for name in call.args:
            if name in maker:
                readers[maker[name]] = readers.get(maker[name], 0) + 1
        maker |= dict.fromkeys(call.results, position)
    returned = {maker[name] for name in program.outputs if name in maker}
    for block in blocks:
        if readers.get(block.position, 0) > 1 or block.position in returned:
            return f"the result of {block_name(program, block)} is read by later blocks too"
    return None


def remove_blocks(program: Program, indices: Collection[int]) -> None:
    """Take blocks out of a program, in place.

    The config's number of layers and its lists with an entry a layer follow, KV states are
    numbered anew, and weights, functions and states that nothing reads any more are dropped.

    Args:
        indices: Among `find_blocks`.
    """
    blocks = find_blocks(program)
    shrink_config(decoder_config(program.config), len(blocks), set(indices))
    streams = {blocks[index].position: blocks[index].stream for index in indices}
    instead: dict[str, str] = {}
    kept: list[Call] = []
    for position, call in enumerate(program.calls):
        call.args = [instead.get(name, name) for name in call.args]
        if position in streams:
            instead[call.results[0]] = call.args[streams[position]]
            continue
        for name in call.results:
            instead.pop(name, None)
        kept.append(call)
    program.calls = kept
    program.prune_unused()
    _renumber_states(program)


def _renumber_states(program: Program) -> None:
    names = {old: f"kv.{number}" for number, old in enumerate(program.states)}
    states = {}
    for old, state in program.states.items():
        state.name = names[old]
        states[names[old]] = state
    program.states = states
    for call in program.calls:
        call.caches = {slot: names[name] for slot, name in call.caches.items()}


@dataclass(frozen=True)
class SubBlock:
    """A term added to the stream inside a block.

    Attributes:
        kind: `attention` or `ffn`.
        term: The value that is added.
        node: The node that adds it: to the stream, or to a term beside it.
        behind: The stream behind the addition.
    """

    kind: str
    term: Value
    node: Node
    behind: Value


def sub_blocks(function: Function, stream: int) -> list[SubBlock]:
    """Return the terms that a block adds to its stream, in order; [] where it is no plain sum."""
    source = function.params[stream]
    adds = _sum_chain(function.results[0], source)
    points = {source} | {node.output for node, _ in adds}
    uses = function.uses()
    found: list[SubBlock] = []
    for node, term in reversed(adds):
        for inner, part in _terms(node, term, uses):
            nodes = region(function, [part], points)
            kind = "attention" if any(map(_is_attention, nodes)) else "ffn"
            found.append(SubBlock(kind, part, inner, node.output))
    return found


def _is_attention(node: Node) -> bool:
    """Return whether a node mixes tokens: an attention, or the product with a softmax of one.

    Capture leaves an attention of unusual form in ATen ops.
    """
    if node.op in ("aten.matmul.default", "aten.bmm.default"):
        weights = node.inputs[0].node if node.inputs[0] is not None else None
        while weights is not None and weights.op.startswith("aten.to.") and weights.inputs[0]:
            weights = weights.inputs[0].node
        return weights is not None and weights.op.startswith(("aten.softmax.", "aten._softmax."))
    return node.op in ATTENTIONS


def _terms(
    node: Node, term: Value, uses: dict[Value, list[tuple[Node, int]]]
) -> list[tuple[Node, Value]]:
    """Return the (addition, term) pairs of what is added: parallel parts are a sum themselves."""
    inner = term.node
    if inner is None or inner.op != "add" or len(uses[term]) != 1:
        return [(node, term)]
    if any(value is None or value.node is None for value in inner.inputs):
        return [(node, term)]
    return [pair for value in inner.inputs if value for pair in _terms(inner, value, uses)]


def _sum_chain(result: Value, source: Value) -> list[tuple[Node, Value]]:
    """Return the (addition, other operand) pairs between a sum and one of its terms, or []."""
    if result is source or result.node is None or result.node.op != "add":
        return []
    node = result.node
    for index in (0, 1):
        value, other = node.inputs[index], node.inputs[1 - index]
        if value is None or other is None:
            continue
        if value is source:
            return [(node, other)]
        rest = _sum_chain(value, source)
        if rest:
            return [(node, other), *rest]
    return []


def without_sub_block(function: Function, stream: int, kinds: Iterable[str], name: str) -> Function:
    """Return a copy of a block's function that adds no term of these kinds.

    Raises:
        ValueError: The block is no plain sum, or nothing of it would be left.
    """
    rewritten = function.clone(name)
    wanted = set(kinds)
    terms = sub_blocks(rewritten, stream)
    if not terms or all(part.kind in wanted for part in terms):
        raise ValueError(f"{function.name} is not a stream to which parts are added one by one")
    # One at a time: what is left of a sum of two terms is no sum any more.
    while gone := next(
        (part for part in sub_blocks(rewritten, stream) if part.kind in wanted), None
    ):
        left = next(value for value in gone.node.inputs if value is not gone.term)
        assert left is not None
        rewritten.replace(gone.node.output, left)
    caches = rewritten.caches
    rewritten.caches = []
    remove_dead(rewritten)
    alive = {value for node in rewritten.nodes for value in node.outputs}
    rewritten.caches = [cache for cache in caches if cache.present_k in alive]
    return rewritten


def remove_sub_blocks(program: Program, places: Iterable[tuple[int, str]]) -> None:
    """Take sub-blocks out of a program, in place; a block that loses all of them goes whole.

    Args:
        places: (index among `find_blocks`, kind) pairs; the kind `block` is the whole block.

    Raises:
        ValueError: A block is no plain sum.
    """
    blocks = find_blocks(program)
    by_block: dict[int, set[str]] = {}
    for index, kind in places:
        by_block.setdefault(index, set()).add(kind)
    whole: list[int] = []
    made: dict[tuple[str, tuple[str, ...]], str] = {}
    for index, kinds in by_block.items():
        block = blocks[index]
        call = program.calls[block.position]
        function = program.functions[call.function]
        terms = sub_blocks(function, block.stream)
        if "block" in kinds or (terms and all(part.kind in kinds for part in terms)):
            whole.append(index)
            continue
        key = (call.function, tuple(sorted(kinds)))
        if key not in made:
            name = unique_name(f"{call.function}_no_{'_'.join(key[1])}", set(program.functions))
            program.functions[name] = without_sub_block(function, block.stream, kinds, name)
            made[key] = name
        _retarget(call, program.functions[made[key]])
    if whole:
        remove_blocks(program, whole)
    else:
        program.prune_unused()
        _renumber_states(program)


def _retarget(call: Call, new: Function) -> None:
    call.function = new.name
    call.weights = {slot: weight for slot, weight in call.weights.items() if slot in new.weights}
    slots = {cache.slot for cache in new.caches}
    call.caches = {slot: state for slot, state in call.caches.items() if slot in slots}
    used = {v.name for n in new.nodes for v in n.attrs.values() if isinstance(v, Param)}
    call.attrs = {key: value for key, value in call.attrs.items() if key in used}
