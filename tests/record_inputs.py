"""Records what each process trains on: `torchrun record_inputs.py FOLDER SCRIPT ...` saves it in `FOLDER/RANK.pt`."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer


training_step = Trainer.training_step
inputs: list[torch.Tensor] = []
initial_weights: list[torch.Tensor] = []


def record_step(trainer: Trainer, model: torch.nn.Module, batch: dict[str, torch.Tensor], *args) -> Any:
    if not initial_weights:
        initial_weights.extend(parameter.detach().clone() for parameter in model.parameters())
    has_label = batch["labels"].ne(-100).view(len(batch["labels"]), -1).any(dim=1)
    inputs.extend(batch["pixel_values"][has_label])
    return training_step(trainer, model, batch, *args)


if __name__ == "__main__":
    Trainer.training_step = record_step
    file = Path(sys.argv[1], os.environ["RANK"]).with_suffix(".pt")
    del sys.argv[:2]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if that script had been started
    runpy.run_path(sys.argv[0], run_name="__main__")
    torch.save({"inputs": torch.stack(inputs), "initial_weights": initial_weights}, file)
