"""Small training runs on the CPU: arguments of the Trainer and a metric."""

from pathlib import Path

from transformers import EvalPrediction, TrainingArguments


# Later releases of transformers have another name for it
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


def arguments(folder: Path, **options) -> TrainingArguments:
    return TrainingArguments(folder, **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, **options})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean().item()}
