"""Small training runs on the CPU: images, arguments of the Trainer and a metric."""

from pathlib import Path

import torch
from transformers import EvalPrediction, TrainingArguments


# Later releases of transformers have another name for it
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


def arguments(folder: Path, **options) -> TrainingArguments:
    return TrainingArguments(folder, **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, **options})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean().item()}


def images_of(labels) -> list[dict]:
    return [{"pixel_values": torch.randn(3, 36, 36), "labels": label} for label in labels]
