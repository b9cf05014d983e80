"""A runner that checks the weights it reads."""

from __future__ import annotations

import torch

from graphopt.execute.interpreter import Runner
from graphopt.files.finite import check_finite


class CheckedRunner(Runner):
    """A runner that refuses weights with NaN or Inf, and constants with NaN, when it reads them."""

    def weight(self, name: str) -> torch.Tensor:
        known = name in self._kept
        value = super().weight(name)
        if not known:
            check_finite(name, value, constant=self.program.weights[name].constant)
        return value
