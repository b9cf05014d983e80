"""What a pass says it changed is compared with what it changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from programs import tiny_program

from graphopt.errors import VerifyError
from graphopt.ir import Array, KVState, Producer, Program, Rows, Weight
from graphopt.pass_manager.contract import Context, Pass, PassResult
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.pass_manager.run_options import RunOptions

NAME = "layers.0.mlp.down_proj.weight"


@dataclass
class Claiming(Pass):
    """Does `act` and says that it changed `changed` places."""

    changed: int = 0
    name: ClassVar[str] = "test-claiming"
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True
    act: ClassVar[Callable[[Program, Context], None]]

    def run(self, program: Program, context: Context) -> PassResult:
        type(self).act(program, context)
        return PassResult(program, 1, self.changed)


def run(act: Callable[[Program, Context], None], changed: int = 0, verify: bool = False) -> Program:
    Claiming.act = staticmethod(act)
    return Pipeline([Claiming(changed)]).run(tiny_program(), RunOptions(verify=verify))[0]


def _replace(program: Program, producer) -> None:
    program.weights.replace(replace(program.weights[NAME], producer=producer))


def new_value(program: Program, context: Context) -> None:
    _replace(program, Array(program.weights[NAME].load() * 2))


def one_element(program: Program, context: Context) -> None:
    value = program.weights[NAME].load().clone()
    value[3, 5] = value[3, 5].nextafter(torch.tensor(9.0))
    _replace(program, Array(value))


def rows_turned_round(program: Program, context: Context) -> None:
    weight = program.weights[NAME]
    _replace(program, Rows(weight.producer, tuple(range(weight.shape[0] - 1, -1, -1))))


def another_dtype(program: Program, context: Context) -> None:
    _replace(program, Array(program.weights[NAME].load().half()))


def another_weight_in_a_slot(program: Program, context: Context) -> None:
    first, second = (call for call in program.calls if "layers" in call.path)
    first.weights.update(second.weights)


def an_attribute(program: Program, context: Context) -> None:
    for function in program.functions.values():
        for node in function.nodes:
            if node.op == "rms_norm":
                node.attrs["eps"] = 1e-3


def the_config(program: Program, context: Context) -> None:
    program.config["bos_token_id"] = 5


def the_tokenizer(program: Program, context: Context) -> None:
    program.tokenizer = "elsewhere"


def a_state(program: Program, context: Context) -> None:
    program.states["kv.0"] = KVState("kv.0", 2, 8, 8)


@dataclass(frozen=True, eq=False)
class Alike(Array):
    """A producer that says that it is equal to any other."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = Array.__hash__


def a_producer_that_looks_equal(program: Program, context: Context) -> None:
    _replace(program, Alike(program.weights[NAME].load() * 2))


@dataclass(frozen=True)
class Doubled(Producer):
    """Twice another producer's value; `times` is not compared."""

    source: Producer
    times: int = field(default=2, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> torch.Tensor:
        return self.source.load() * self.times


def a_field_that_is_not_compared(program: Program, context: Context) -> None:
    producer = program.weights[NAME].producer
    assert isinstance(producer, Doubled)
    _replace(program, Doubled(producer.source, 3))


def a_weight_more(program: Program, context: Context) -> None:
    program.weights.add(Weight("more", Array(torch.ones(2))))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("act", "found"),
    [
        (new_value, rf"weight '{NAME}' has another value"),
        (one_element, rf"weight '{NAME}' has another value"),
        (rows_turned_round, rf"weight '{NAME}' has another value"),
        (another_dtype, rf"weight '{NAME}' has another value"),
        (another_weight_in_a_slot, "the program's calls changed"),
        (an_attribute, "the program's functions changed"),
        (the_config, "the program's config changed"),
        (the_tokenizer, "the program's tokenizer changed"),
        (a_state, "the program's states changed"),
        (a_producer_that_looks_equal, rf"weight '{NAME}' has another value"),
        (a_weight_more, "weight 'more' is new"),
    ],
)
def test_a_pass_that_hides_a_change_is_refused(act, found, verify):
    with pytest.raises(VerifyError, match=rf"says that it changed nothing, but {found}"):
        run(act, verify=verify)


def test_fields_count_that_a_producer_does_not_compare():
    program = tiny_program()
    weight = program.weights[NAME]
    program.weights.replace(weight.with_producer(Doubled(weight.producer)))
    Claiming.act = staticmethod(a_field_that_is_not_compared)
    with pytest.raises(VerifyError, match=rf"weight '{NAME}' has another value"):
        Pipeline([Claiming()]).run(program, RunOptions(verify=False))


def test_a_weight_that_is_gone():
    def drop(program: Program, context: Context) -> None:
        program.weights.remove("spare")

    program = tiny_program()
    program.weights.add(Weight("spare", Array(torch.ones(2))))
    Claiming.act = staticmethod(drop)
    with pytest.raises(VerifyError, match="weight 'spare' is gone"):
        Pipeline([Claiming()]).run(program, RunOptions(verify=False))


def test_a_change_that_is_none_is_refused():
    with pytest.raises(VerifyError, match="says that it changed 2 places, but the program is as"):
        run(lambda program, context: None, changed=2)


def test_an_equal_value_in_a_new_place_is_no_change():
    def same(program: Program, context: Context) -> None:
        _replace(program, Array(program.weights[NAME].load().clone()))
        program.notes.append(("here", "a note"))

    assert run(same).notes


def _in_place(value: torch.Tensor) -> None:
    value.mul_(2)


def _through_numpy(value: torch.Tensor) -> None:
    value.numpy()[3, 5] += 1


def _past_autograd(value: torch.Tensor) -> None:
    value.data[0] = value.data[1]


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("way", [_in_place, _through_numpy, _past_autograd])
def test_writing_into_a_tensor_of_the_source_is_refused(changed, way):
    def write(program: Program, context: Context) -> None:
        way(program.weights[NAME].load())

    with pytest.raises(VerifyError, match=f"got a copy of: weight '{NAME}' was written to"):
        run(write, changed)


def test_changing_the_dense_program_is_refused():
    def spoil(program: Program, context: Context) -> None:
        assert context.dense is not None
        context.dense.calls.pop()

    with pytest.raises(VerifyError, match="got a copy of: the program's calls changed"):
        run(spoil)


def test_a_weight_cannot_be_changed_behind_its_store():
    with pytest.raises(AttributeError):
        tiny_program().weights[NAME].producer = Array(torch.ones(1))
