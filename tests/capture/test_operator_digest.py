"""What calls the same operators is exported once in a process, and nothing else together."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture, export, known_exports
from graphopt.capture.known_exports import KnownExports
from graphopt.execute.interpreter import Runner

VOCAB, WIDTH = 50, 16


class Layer(nn.Module):
    """Its number stands where no comparison of attributes sees it."""

    def __init__(self, what: str, number: float, label: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("held", torch.full((WIDTH,), float(number)))
        self.label = label
        self._what, self._number = what, {"number": number}

    def forward(self, x: Tensor) -> Tensor:
        number, y = self._number["number"], self.linear(x)
        if self._what == "factor":
            y = y * number
        elif self._what == "tensor":
            y = y * torch.tensor(number)
        elif self._what == "buffer":
            y = y * self.held
        elif self._what == "window":
            y = y + x[:, : torch.sym_min(x.shape[1], int(number))].mean(1, keepdim=True)
        return x + y


class Decoder(nn.Module):
    def __init__(self, what: str, numbers: list[float], labels: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        pairs = zip(numbers, labels, strict=True)
        self.layers = nn.ModuleList([Layer(what, number, label) for number, label in pairs])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch.export is asked to trace, where nothing is known yet."""
    monkeypatch.setattr(export, "KNOWN", KnownExports())
    traced: list[str] = []
    original = export.export_function

    def counted(module, types, where):
        traced.append(where)
        return original(module, types, where)

    monkeypatch.setattr(export, "export_function", counted)
    return traced


def check(model: nn.Module) -> None:
    """Compare a program with its model."""
    program = capture(model)
    for length in (1, 11, 40):
        ids = torch.randint(0, VOCAB, (2, length))
        with torch.no_grad():
            wanted = model(ids)
        # Three layers and a head of sums of 16 products in 24 bits.
        torch.testing.assert_close(
            Runner(program).logits({"input_ids": ids}), wanted, rtol=1e-5, atol=1e-5
        )


def decoder(what: str, numbers: list[float], labels: str = "aaa") -> nn.Module:
    torch.manual_seed(0)
    return Decoder(what, numbers, labels).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "numbers", "labels", "exports"),
    [
        ("factor", [0.5, 0.5, 0.5], "aaa", 1),
        ("factor", [0.5, 0.5, 0.5], "aab", 1),
        ("factor", [0.5, 0.5, 0.25], "aaa", 2),
        ("tensor", [0.5, 0.5, 0.5], "aaa", 1),
        ("tensor", [0.5, 0.5, 0.25], "aaa", 2),
        ("buffer", [0.5, 0.5, 0.25], "aaa", 1),
        # Equal at the length that is traced, 11.
        ("window", [20, 20, 30], "aaa", 2),
    ],
)
def test_layers_that_differ_are_told_apart(
    what: str, numbers: list[float], labels: str, exports: int, exported: list[str]
) -> None:
    check(decoder(what, numbers, labels))
    assert len(exported) == 1 + exports


@pytest.mark.slow
@pytest.mark.parametrize("what", ["factor", "tensor", "buffer", "window"])
def test_a_second_model_has_its_own_numbers(what: str, exported: list[str]) -> None:
    first, again, other = ([20.0] * 3, [20.0] * 3, [30.0] * 3)
    check(decoder(what, first))
    assert len(exported) == 2
    check(decoder(what, again))
    assert len(exported) == 2
    check(decoder(what, other))
    assert len(exported) == (2 if what == "buffer" else 3)


@pytest.mark.slow
def test_what_is_known_holds_no_module(exported: list[str]) -> None:
    model = decoder("buffer", [0.5] * 3)
    layer, buffer = weakref.ref(model.layers[0]), weakref.ref(model.layers[0].held)
    capture(model)
    assert len(exported) == 2
    del model
    gc.collect()
    assert layer() is None and buffer() is None


@pytest.mark.slow
def test_the_export_that_was_unused_longest_is_forgotten(exported: list[str], monkeypatch) -> None:
    monkeypatch.setattr(known_exports, "_MOST", 2)
    for numbers in ([1.0] * 3, [2.0] * 3, [2.0] * 3, [1.0] * 3):
        check(decoder("factor", numbers))
    # The outer graph of all, and a layer each: the first one's had to go for the second one's.
    assert len(exported) == 4
