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
"""The model card of a fine-tuned CrossViT, which says what is known of it, and no more."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer
from transformers.modelcard import TrainingSummary, make_markdown_table

from ..configuration_crossvit import CrossViTConfig


USAGE = """\
```python
from transformers import pipeline

classifier = pipeline("image-classification", model="{repository}"{remote_code})
print(classifier("image.jpg"))
```"""


def find_base_model(config: CrossViTConfig) -> tuple[str | None, str]:
    """
    Where the weights came from that a model with this configuration began with.

    Returns:
        `tuple[str | None, str]`: the repository on the Hub, if it is known, and a sentence.
    """
    origin = config._name_or_path
    if not origin:
        return None, "It was trained from scratch."
    if not Path(origin).is_dir():
        return origin, f"It was fine-tuned from [{origin}](https://huggingface.co/{origin})."
    # A converted or fine-tuned checkpoint names its own origin in its card
    card = Path(origin) / "README.md"
    base_model = ModelCard.load(card).data.get("base_model") if card.is_file() else None
    if isinstance(base_model, str):
        return base_model, f"It was fine-tuned from weights of [{base_model}](https://huggingface.co/{base_model})."
    return None, "It was fine-tuned from weights on the author's machine, whose origin is not recorded."


def write_model_card(trainer: Trainer, **kwargs) -> None:
    """
    Writes README.md into `trainer.args.output_dir`.

    Args:
        trainer ([`~transformers.Trainer`]): of a [`CrossViTForImageClassification`].
        kwargs (`dict[str, Any]`, *optional*):
            As in [`~transformers.Trainer.create_model_card`]: `license`, `dataset`, `dataset_tags`... What is not
            given is not claimed; `finetuned_from` is looked up.
    """
    config = trainer.accelerator.unwrap_model(trainer.model).config
    base_model, origin = find_base_model(config)
    if kwargs.get("finetuned_from"):
        base_model = kwargs["finetuned_from"]
        origin = f"It was fine-tuned from [{base_model}](https://huggingface.co/{base_model})."
    # "" keeps the summary from a guess of its own
    options = {"tasks": "image-classification", **kwargs, "finetuned_from": base_model or ""}
    summary = TrainingSummary.from_trainer(trainer, **options)
    metadata: dict[str, Any] = {
        **summary.create_metadata(),
        "pipeline_tag": "image-classification",
        "tags": list(dict.fromkeys([*(summary.tags or []), "vision", "image-classification", "crossvit"])),
    }
    if not metadata["model-index"][0]["results"]:  # they need a data set with a name
        del metadata["model-index"]
    text = [
        f"# {summary.model_name}",
        "A CrossViT ([paper](https://arxiv.org/abs/2103.14899)) that tells"
        f" {config.num_labels} classes apart: {class_names(config)}. {origin}",
        f"Data: {', '.join(listed(summary.dataset)) or 'not recorded'}.",
        "## Use",
        USAGE.format(
            repository=trainer.hub_model_id or Path(trainer.args.output_dir).name,
            remote_code=", trust_remote_code=True" if getattr(config, "auto_map", None) else "",
        ),
        "`trust_remote_code=True` runs the model code of the repository; `import crossvit` makes it unnecessary."
        if getattr(config, "auto_map", None)
        else "Needs the package `crossvit`, and `import crossvit` first.",
        "## Training",
        "\n".join(f"- {name}: {value}" for name, value in (summary.hyperparameters or {}).items()),
    ]
    if summary.eval_results:
        text += ["Last evaluation, on the evaluation data of the training:"]
        text += ["\n".join(f"- {name}: {value}" for name, value in summary.eval_results.items())]
    if summary.eval_lines:
        text += [make_markdown_table(summary.eval_lines)]
    card = f"---\n{ModelCardData(**metadata)}\n---\n\n" + "\n\n".join(text) + "\n"
    (Path(trainer.args.output_dir) / "README.md").write_text(card, encoding="utf-8")


def listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def class_names(config: CrossViTConfig, limit: int = 20) -> str:
    names = [str(name) for name in config.id2label.values()]
    return "; ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


__all__ = ["write_model_card"]
