"""Runs a script and records the inputs of each process: `torchrun record_inputs.py FOLDER SCRIPT ...`."""

import os
import runpy
import sys
from pathlib import Path

import torch
from transformers import Trainer


folder = Path(sys.argv[1])
rank = int(os.environ.get("RANK", "0"))
inputs: list[torch.Tensor] = []
weights: list[float] = []
training_step = Trainer.training_step


def record_step(trainer, model, batch, *args, **kwargs):
    real = batch["labels"].ne(-100).flatten(1).any(dim=1) if batch["labels"].ndim > 1 else batch["labels"].ne(-100)
    inputs.extend(batch["pixel_values"][real].clone())
    weights.append(sum(weight.double().sum().item() for weight in model.parameters()))
    return training_step(trainer, model, batch, *args, **kwargs)


if __name__ == "__main__":
    Trainer.training_step = record_step
    del sys.argv[:2]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if that script had been started
    runpy.run_path(sys.argv[0], run_name="__main__")
    torch.save({"inputs": torch.stack(inputs), "weights": weights}, folder / f"{rank}.pt")
