# Copyright 2026 The CrossViT for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The model card of a trained model."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from crossvit import CrossViTConfig
from crossvit.training.trainer import unwrap_peft


class ModelCardTrainer(Trainer):
    """A [`~transformers.Trainer`] whose model cards say where the weights come from."""

    def create_model_card(self, **kwargs) -> None:
        """
        As [`~transformers.Trainer.create_model_card`], with the origin of weights from a folder and rounded metrics,
        and with the columns of a resumed run's log in one order.
        """
        config = unwrap_peft(self.accelerator.unwrap_model(self.model)).config
        log_history = self.state.log_history
        self.state.log_history = [
            {name: round(value, 4) if isinstance(value, float) else value for name, value in sorted(entry.items())}
            for entry in log_history
        ]
        known: dict[str, Any] = {
            "tasks": "image-classification",
            "tags": ["image-classification", "vision", "crossvit", "generated_from_trainer"],
            "finetuned_from": find_base_model(config),
        }
        super().create_model_card(**{**known, **kwargs})
        self.state.log_history = log_history
        if self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            text = card.read_text(encoding="utf-8")
            origin = "was trained from scratch"
            if config._name_or_path:
                origin = "is a fine-tuned version of a local checkpoint"
            text = text.replace("is a fine-tuned version of [](https://huggingface.co/)", origin)
            card.write_text(text, encoding="utf-8")


def find_base_model(config: CrossViTConfig) -> str:
    """The repository that a model, or the checkpoint in a folder that it was loaded from, comes from; else ""."""
    name = config._name_or_path
    if not name or not Path(name).is_dir():
        return name
    record, card = Path(name) / "conversion.json", Path(name) / "README.md"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8")).get("source", {}).get("repository") or ""
    base = ModelCard.load(card).data.get("base_model") if card.is_file() else None
    return base if isinstance(base, str) else ""
