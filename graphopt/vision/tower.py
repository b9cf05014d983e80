"""What is around the decoder of a program's model, run by transformers: pixels to embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.capture import model_of_config
from graphopt.errors import UsageError
from graphopt.execute.interpreter import Runner
from graphopt.ir.graph import Program
from graphopt.ir.sighted import rows_alone
from graphopt.runtime.picture_tower import Tower


class VisionTower(Tower):
    """The tower, the projector and the merging of a program's model.

    They are transformers' own, with the weights that the program carries; words become what the
    program makes of them.

    Raises:
        UsageError: The program is a model of text alone, or looks no words up in a table.
    """

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if program.vision is None:
            raise UsageError(
                f"{program.name} is a model of text alone and takes no pictures.",
                "Give a vision-language model, or leave the pictures out.",
            )
        if "auto_map" in program.config:
            raise UsageError(
                f"{program.name} is of a class that its checkpoint brings (auto_map), and pictures "
                "are looked at by transformers' own classes alone.",
                "Give the output folder that the checkpoint lies in, or use the model on text.",
            )
        self.program, self.vision = program, program.vision
        runner = Runner(rows_alone(program), dtype=dtype, device=torch.device(device))

        def embed(ids: Tensor) -> Tensor:
            outputs, _ = runner.run({"input_ids": ids})
            return outputs[0]

        super().__init__(
            model_of_config(program.config),
            {weight.name: weight.load(dtype) for weight in self.vision.carried},
            embed,
            image_token=self.vision.image_token,
            axes=self.vision.sections is not None,
            both_ways=self.vision.both_ways,
            dtype=dtype,
            device=device,
        )
