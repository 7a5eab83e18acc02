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
"""The model card of a converted checkpoint."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from reference import VARIANTS

from crossvit import CrossViTConfig


PAPER = "https://arxiv.org/abs/2103.14899"
TIMM_RESULTS = "https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv"

USAGE = """\
```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

checkpoint = "{checkpoint}"
processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(checkpoint, trust_remote_code=True).eval()

image = Image.open("image.jpg")
with torch.no_grad():
    logits = model(**processor(image, return_tensors="pt")).logits
print(model.config.id2label[logits.argmax(-1).item()])
```

`trust_remote_code=True` runs the model code in this repository. It is not needed with the package `crossvit` installed
and imported. `AutoImageProcessor.from_pretrained(checkpoint, backend="pil", trust_remote_code=True)` equals timm's
evaluation transform bit by bit."""

CITATION = """\
```bibtex
@inproceedings{chen2021crossvit,
  title     = {{CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification}},
  author    = {Chun-Fu (Richard) Chen and Quanfu Fan and Rameswar Panda},
  booktitle = {International Conference on Computer Vision (ICCV)},
  year      = {2021}
}
```"""


def find_published(source: dict[str, str]) -> dict[str, Any] | None:
    """The entry of variants.json whose published weights a source is."""
    for variant in VARIANTS.values():
        if source.get("repository") == variant["timm_id"] or source.get("url", "").endswith("/" + variant["ibm_file"]):
            return variant
    return None


def make_model_card(config: CrossViTConfig, record: dict[str, Any], repo_id: str | None = None) -> str:
    """
    The model card, which claims dataset, accuracy and license only for published weights.

    Args:
        config (`CrossViTConfig`): the configuration of the checkpoint.
        record (`dict`): the contents of its conversion.json.
        repo_id (`str`, *optional*): the repository that it is for.
    """
    source, published = record["source"], find_published(record["source"])
    title = repo_id.split("/")[-1] if repo_id else record["variant"] or "CrossViT"
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vision", "image-classification", "crossvit"],
    }
    origin = "Training data, license and accuracy are not recorded in the source: add them here before publishing."
    if published:
        top1, top5 = published["imagenet_top1"], published["imagenet_top5"]
        results = {"accuracy": top1["timm"], "top_5_accuracy": top5["timm"]}
        metadata |= {
            "license": "apache-2.0",
            "datasets": ["ILSVRC/imagenet-1k"],
            "base_model": published["timm_id"],
            "model_name": title,
            "eval_results": [
                EvalResult(
                    task_type="image-classification",
                    dataset_type="ILSVRC/imagenet-1k",
                    dataset_name="ImageNet-1k",
                    dataset_split="validation",
                    metric_type=metric,
                    metric_value=value,
                    source_name="timm, results on ImageNet",
                    source_url=TIMM_RESULTS,
                )
                for metric, value in results.items()
            ],
        }
        origin = (
            "The authors trained the weights on ImageNet-1k with the recipe of the paper. Published top-1 accuracy,"
            f" not measured again: {top1['paper']} % ([paper]({PAPER})), {top1['timm']} % ([timm]({TIMM_RESULTS}))."
        )
    elif "repository" in source:
        metadata["base_model"] = source["repository"]

    sizes = " and ".join(f"{height}x{width}" for height, width in config.image_sizes)
    differences = record["largest_logit_difference"]
    return f"""---
{ModelCardData(**metadata)}
---

# {title}

CrossViT processes an image in two branches, with small and with large patches. After each stage, the class token of
one branch attends to the patches of the other ([paper]({PAPER}), ICCV 2021). This checkpoint has
{config.num_labels} classes, {record["parameters"] / 1e6:.1f} M parameters, and branches with images of {sizes} pixels.

## Use

{USAGE.format(checkpoint=repo_id or "path/to/this-checkpoint")}

## Weights

Converted from {", ".join(f"{name} `{value}`" for name, value in source.items())}. {origin}

Before saving, the logits were compared with those of timm's model with the source's weights: they differ by at most
{differences["float32"]:.1e} in float32 and {differences["float64"]:.1e} in float64 (`conversion.json`).

## Citation

{CITATION}
"""
