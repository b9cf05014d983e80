"""Layers that call the same operators are exported once, and no others together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture, export
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
def test_programs_compute_what_their_layers_do(
    what: str, numbers: list[float], labels: str, exports: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[str] = []

    def export_layer(call, types):
        exported.append(call.path)
        return original(call, types)

    original = export.export_layer
    monkeypatch.setattr(export, "export_layer", export_layer)
    torch.manual_seed(0)
    model = Decoder(what, numbers, labels).eval()
    program = capture(model)
    assert len(exported) == exports
    for length in (1, 11, 40):
        ids = torch.randint(0, VOCAB, (2, length))
        with torch.no_grad():
            wanted = model(ids)
        # Three layers and a head of sums of 16 products in 24 bits.
        torch.testing.assert_close(
            Runner(program).logits({"input_ids": ids}), wanted, rtol=1e-5, atol=1e-5
        )
