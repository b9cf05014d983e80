"""Small programs for the tests of passes: built by hand, or drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphopt.execute.interpreter import Runner
from graphopt.ir import Array, B, Call, Function, Node, Program, S, Type, Value, Weight
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_program
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context, Pass, PassResult

X = Type((B, S, 8), torch.float64)
IDS = Type((B, S), torch.int64)


def function(name: str = "block", params: tuple[str, ...] = ("x",)) -> Function:
    """Return an empty function with named parameters."""
    result = Function(name)
    result.params = [Value(param) for param in params]
    return result


def slot(owner: Function, name: str) -> Value:
    """Add a weight slot and return its value."""
    value = Value(name.replace(".", "_"))
    owner.weights[name] = value
    return value


def one(
    owner: Function,
    *,
    weights: Mapping[str, Tensor] | None = None,
    constants: Mapping[str, Tensor] | None = None,
    inputs: Mapping[str, Type] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Program:
    """Return a program of one call; parameters are inputs of their names, [B, S, 8] fp64."""
    program = Program("small")
    program.inputs = {"input_ids": IDS}
    for param in owner.params:
        program.inputs[param.name] = (inputs or {}).get(param.name, X)
    names = [f"r{index}" for index in range(len(owner.results))]
    for key, tensor in (weights or {}).items():
        program.weights.add(Weight(key, Array(tensor)))
    for key, tensor in (constants or {}).items():
        program.weights.add(Weight(key, Array(tensor), constant=True))
    program.functions[owner.name] = owner
    args = [param.name for param in owner.params]
    used = {key: key for key in owner.weights}
    program.calls = [Call(owner.name, args, names, used, dict(attrs or {}))]
    program.outputs = names
    return program


def results(program: Program, seed: int = 0) -> list[Tensor]:
    """Return the outputs of a program for random inputs, in fp64, batch 2, length 3."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for name, kind in program.inputs.items():
        shape = kind.concrete({B: 2, S: 3})
        if kind.dtype.is_floating_point:
            inputs[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            inputs[name] = torch.randint(0, 5, shape, generator=generator)
    environment: dict[str, Tensor] = {}
    runner = Runner(program, dtype=torch.float64)
    with torch.no_grad():
        for _, environments in runner.stream([inputs]):
            environment = dict(environments[0])
    return [environment[name] for name in program.outputs]


def check_text(
    item: Pass, before: str, after: str, values: Mapping[str, Tensor] | None = None
) -> PassResult:
    """Run an exact pass on the program of a text; what it makes is that of another text.

    Both are verified, and give the same results bit for bit.

    Args:
        before, after: As `graphopt.ir.parse` reads them; weights without values are ones.
        values: Values of weights.
    """
    program = parse_program(before)
    given = {w.name: torch.ones(w.shape, dtype=w.dtype) for w in program.weights} | dict(
        values or {}
    )
    program = parse_program(before, given)
    verify(program)
    expected = results(program)
    result = item.run(program, Context())
    verify(result.program)
    shown = print_program(result.program, facts=False)
    assert shown == print_program(parse_program(after), facts=False)
    torch.testing.assert_close(results(result.program), expected, rtol=0, atol=0)
    return result


_STEPS = (
    "sum", "product", "scale", "unit", "tanh", "split", "merge", "swap", "rope", "norm", "linear",
    "const",
)  # fmt: skip


class _Builder:
    """Draws a function node by node; every value has a kind that says its layout."""

    def __init__(self, draw: st.DrawFn, name: str) -> None:
        self.draw = draw
        self.function = function(name, ("x", "y"))
        self.pool: list[tuple[Value, str]] = [(v, "x") for v in self.function.params]
        self.tensors: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.cos, self.sin = slot(self.function, "cos"), slot(self.function, "sin")

    def pick(self, kinds: str = "xhs") -> tuple[Value, str] | None:
        choices = [item for item in self.pool if item[1] in kinds]
        return self.draw(st.sampled_from(choices)) if choices else None

    def add(self, op: str, inputs: list[Value], kind: str, **attrs: Any) -> Node:
        node = self.function.add(op, inputs, attrs)
        self.pool.append((node.output, kind))
        return node

    def weight(self, shape: tuple[int, ...], constant: bool = False) -> Value:
        number = len(self.function.weights)
        # Dyadic values, and few distinct ones, so that slots often hold equal weights.
        seed = self.draw(st.integers(0, 2))
        tensor = (torch.arange(torch.Size(shape).numel()) % (3 + seed) - 1.0).reshape(shape) / 4
        (self.constants if constant else self.tensors)[f"w{number}"] = tensor.double()
        return slot(self.function, f"w{number}")

    def step(self) -> None:
        kind = self.draw(st.sampled_from(_STEPS))
        match kind:
            case "sum" | "product":
                a = self.pick()
                assert a is not None
                b = self.pick(a[1])
                assert b is not None
                self.add({"sum": "add", "product": "mul"}[kind], [a[0], b[0]], a[1])
            case "scale" | "unit" | "tanh":
                a = self.pick()
                assert a is not None
                if kind == "tanh":
                    self.add("tanh", [a[0]], a[1])
                else:
                    factor = 1.0 if kind == "unit" else self.draw(st.sampled_from((0.5, -1.0)))
                    self.add("scale", [a[0]], a[1], factor=factor)
            case "split":
                swap = self.draw(st.booleans())
                a = self.pick("x")
                assert a is not None
                self.add("split_heads", [a[0]], "h" if swap else "s", head_dim=4, swap=swap)
            case "merge":
                if (a := self.pick("hs")) is not None:
                    self.add("merge_heads", [a[0]], "x", swap=a[1] == "h")
            case "swap":
                if (a := self.pick("hs")) is not None:
                    self.add("transpose_heads", [a[0]], "s" if a[1] == "h" else "h")
            case "rope":
                if (a := self.pick("hs")) is not None:
                    first = a[1] == "h"
                    self.add("rope", [a[0], self.cos, self.sin], a[1], heads_first=first)
            case "norm":
                a = self.pick("x")
                assert a is not None
                self.add("rms_norm", [a[0], self.weight((8,))], "x", eps=0.5)
            case "linear":
                a = self.pick("x")
                assert a is not None
                self.add("linear", [a[0], self.weight((8, 8))], "x")
            case "const":
                a = self.pick("x")
                assert a is not None
                w = self.weight((8,), constant=True)
                c = self.function.add("scale", [w], {"factor": 0.5}).output
                c = self.function.add("tanh", [c]).output
                node = self.function.add("add", [c, a[0]])
                self.pool.append((node.output, "x"))

    def build(self) -> Function:
        for _ in range(self.draw(st.integers(1, 12))):
            self.step()
        values = [value for value, kind in self.pool if kind == "x"]
        self.function.results = self.draw(st.lists(st.sampled_from(values), min_size=2, max_size=3))
        return self.function


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs of one or two functions and up to five calls that rebind their names."""
    program = Program("drawn")
    program.inputs = {"input_ids": IDS, "a": X, "b": X}
    tables = {"cos": torch.tensor([[[0.5, 0.75]]]), "sin": torch.tensor([[[0.25, -0.5]]])}
    for name, tensor in tables.items():
        program.weights.add(Weight(name, Array(tensor.double()), constant=True))
    builders = [_Builder(draw, f"f{index}") for index in range(draw(st.integers(1, 2)))]
    held: dict[bytes, str] = {}
    mapping: dict[tuple[str, str], str] = {}
    for builder in builders:
        made = builder.build()
        program.functions[made.name] = made
        for constant, tensors in ((False, builder.tensors), (True, builder.constants)):
            for key, tensor in tensors.items():
                content = tensor.numpy().tobytes() + bytes([constant])
                name = held.setdefault(content, f"{made.name}.{key}")
                if name not in program.weights:
                    program.weights.add(Weight(name, Array(tensor), constant=constant))
                mapping[made.name, key] = name
        mapping[made.name, "cos"], mapping[made.name, "sin"] = "cos", "sin"
    alive = ["a", "b"]
    for _ in range(draw(st.integers(1, 5))):
        made = draw(st.sampled_from([builder.function for builder in builders]))
        args = [draw(st.sampled_from(alive)) for _ in made.params]
        names = draw(
            st.lists(
                st.sampled_from("abcdefg"),
                min_size=len(made.results),
                max_size=len(made.results),
                unique=True,
            )
        )
        weights = {key: mapping[made.name, key] for key in made.weights}
        program.calls.append(Call(made.name, args, list(names), weights))
        alive = sorted({*alive, *names})
    program.outputs = draw(
        st.lists(st.sampled_from(program.calls[-1].results), min_size=1, unique=True)
    )
    return program
