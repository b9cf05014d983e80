"""Ways to damage ONNX files that keep them readable: what a node, a tensor or an input says."""

from __future__ import annotations

from random import Random
from typing import Any

from fuzz_mutations import mutate_bytes

_NUMBERS = (0, 1, -1, 2, 3, 7, 64, 255, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63))
_TEXTS = ("", "x", "\x1b[2J", "../x", "/dev/zero", "a" * 5000, "é", "input_ids", "logits")
_PLACES = (
    {"location": "../../text.txt"},
    {"location": "/dev/zero"},
    {"location": ""},
    {"location": "."},
    {"location": "\x00"},
    {"offset": "-1"},
    {"offset": str(2**70)},
    {"offset": "x"},
    {"length": "0"},
    {"length": "-8"},
    {"length": "9" * 5000},
    {"length": str(2**40)},
)


def mutate_onnx(random: Random, data: bytes) -> bytes:
    """Return an ONNX file with one to three of its parts changed, or with bytes changed."""
    import onnx

    if random.random() < 0.25:
        return mutate_bytes(random, data)
    model = onnx.load_from_string(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        match random.randrange(8):
            case 0 | 1:
                _change_node(random, model.graph)
            case 2 | 3:
                _change_tensor(random, random.choice(model.graph.initializer))
            case 4 | 5:
                _change_value(random, random.choice([*model.graph.input, *model.graph.output]))
            case 6:
                model.ir_version = random.choice((0, 3, 99, 2**40))
                if model.opset_import:
                    item = random.choice(model.opset_import)
                    item.version = random.choice((0, 1, 9, 99, -1, 2**40))
            case _:
                _change_list(random, random.choice((model.graph.node, model.graph.initializer)))
    return bytes(model.SerializeToString())


def _change_list(random: Random, items: Any) -> None:
    if not items:
        return
    number = random.randrange(len(items))
    match random.randrange(3):
        case 0:
            del items[number]
        case 1:
            items.append(items[number])
        case _:
            item = items[number]
            item.name = random.choice(_TEXTS)


def _change_node(random: Random, graph: Any) -> None:
    node = random.choice(graph.node)
    match random.randrange(5):
        case 0 if node.input:
            others = [name for other in graph.node for name in other.output]
            node.input[random.randrange(len(node.input))] = random.choice((*_TEXTS[:2], *others))
        case 1:
            node.op_type = random.choice(("", "x", "Loop", "If", "Identity", "Expand", "MatMul"))
        case 2:
            node.domain = random.choice(("", "x", "com.microsoft", "ai.onnx.ml"))
        case 3 if node.output:
            node.output[0] = random.choice(("", "x", "logits", "input_ids"))
        case _ if node.attribute:
            entry = random.choice(node.attribute)
            entry.i = random.choice(_NUMBERS)
            entry.f = random.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
            if random.random() < 0.3:
                entry.type = random.choice((0, 1, 2, 3, 6, 7))
            if random.random() < 0.1:
                entry.name = random.choice(_TEXTS)


def _change_tensor(random: Random, tensor: Any) -> None:
    match random.randrange(4):
        case 0:
            sizes = list(tensor.dims)
            new = random.choice(
                (sizes[::-1], [], [0], [-1], [2**40, 2**40], [1, *sizes], [*sizes, 1], sizes[:1])
            )
            del tensor.dims[:]
            tensor.dims.extend(new)
        case 1:
            tensor.data_type = random.choice((0, 1, 2, 7, 8, 10, 11, 16, 17, 21, 99, 2**30))
        case 2 if tensor.external_data:
            for key, value in random.choice(_PLACES).items():
                for entry in tensor.external_data:
                    if entry.key == key:
                        entry.value = value
        case _:
            if random.random() < 0.5:
                tensor.name = random.choice(_TEXTS)
            else:
                tensor.raw_data = random.choice(
                    (b"", b"\x00" * 3, bytes(4000), tensor.raw_data[:-1])
                )


def _change_value(random: Random, value: Any) -> None:
    shape = value.type.tensor_type.shape
    match random.randrange(4):
        case 0:
            value.name = random.choice((*_TEXTS, "past_key_values.9.key", "past_key_values.x"))
        case 1:
            value.type.tensor_type.elem_type = random.choice((0, 1, 7, 8, 9, 10, 11, 16, 99))
        case 2 if shape.dim:
            size = random.choice(shape.dim)
            size.dim_value = random.choice(_NUMBERS)
        case 2 | 3 if shape.dim:
            if random.random() < 0.5:
                del shape.dim[random.randrange(len(shape.dim))]
            else:
                shape.dim.add().dim_value = 1
        case _:
            value.type.Clear()
