"""A compiled forward pass. What torch.compile cannot take as a whole is an error here, never a silent fall-back to the plain model."""

# B batch, C classes, H height, W width

import torch
from torch import Tensor, nn

from stockpot.errors import TrialFailed


class Compiled(nn.Module):
    """The forward pass of a model, compiled; the model keeps its weights and their names.

    Raises `TrialFailed`, with the compiler's first line, for a model that does not compile.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        super().__init__()
        self.run = torch.compile(model, fullgraph=True, backend=backend)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        try:
            logits_BC: Tensor = self.run(images_B3HW)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            told = next(iter(str(error).strip().splitlines()), "no reason given")
            raise TrialFailed(f"The model does not compile ({type(error).__name__}: {told}). Set `compile: false`.") from error
        return logits_BC
