"""The model card of a converted checkpoint: what it is, where it is from, how to use it, and only what is known."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from crossvit import CrossViTConfig


PAPER = "https://arxiv.org/abs/2103.14899"
TIMM_RESULTS = "https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv"
# Where a repository's name is not known yet
PLACEHOLDER = "path/to/this-checkpoint"

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

`trust_remote_code=True` runs the model code in this repository; with the package `crossvit` installed and imported it
is not needed. `AutoImageProcessor.from_pretrained(checkpoint, backend="pil", trust_remote_code=True)` gives the images
of timm's evaluation transform bit by bit."""

CITATION = """\
```bibtex
@inproceedings{chen2021crossvit,
  title     = {{CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification}},
  author    = {Chun-Fu (Richard) Chen and Quanfu Fan and Rameswar Panda},
  booktitle = {International Conference on Computer Vision (ICCV)},
  year      = {2021}
}
```"""


class SourcedResult(EvalResult):
    """A result of its own source: `ModelCardData` would give all results on a data set the source of the first."""

    @property
    def unique_identifier(self) -> tuple:
        return (*super().unique_identifier, self.source_url)


def published_results(variant: dict[str, Any]) -> list[EvalResult]:
    """The published accuracies of a variant's weights, each with its source."""
    top1, top5 = variant["imagenet_top1"], variant["imagenet_top5"]
    reported = [
        ("Top-1 accuracy", "accuracy", top1["paper"], "CrossViT, the paper", PAPER),
        ("Top-1 accuracy", "accuracy", top1["timm"], "timm, results on ImageNet", TIMM_RESULTS),
        ("Top-5 accuracy", "top_5_accuracy", top5["timm"], "timm, results on ImageNet", TIMM_RESULTS),
    ]
    return [
        SourcedResult(
            task_type="image-classification",
            dataset_type="ILSVRC/imagenet-1k",
            dataset_name="ImageNet-1k",
            dataset_split="validation",
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=value,
            source_name=source_name,
            source_url=source_url,
        )
        for metric_name, metric_type, value, source_name, source_url in reported
    ]


def make_model_card(
    config: CrossViTConfig,
    record: dict[str, Any],
    published: dict[str, Any] | None,
    repo_id: str | None = None,
) -> str:
    """
    The card of a converted checkpoint, with the metadata that the Hub reads in front.

    Args:
        config (`CrossViTConfig`): its configuration.
        record (`dict`): the contents of its conversion.json.
        published (`dict`, *optional*): the entry of variants.json whose published weights these are; for any other
            weights the card claims neither data set nor accuracy nor license.
        repo_id (`str`, *optional*): the repository that it is for.
    """
    variant = record["variant"]
    title = repo_id.split("/")[-1] if repo_id else variant or "CrossViT"
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vision", "image-classification", "crossvit"],
    }
    if published:
        metadata |= {
            "license": "apache-2.0",
            "datasets": ["ILSVRC/imagenet-1k"],
            "base_model": published["timm_id"],
            "model_name": title,
            "eval_results": published_results(published),
        }
    elif "repository" in record["source"]:
        metadata["base_model"] = record["source"]["repository"]

    source = ", ".join(f"{name} `{value}`" for name, value in record["source"].items())
    sizes = " and ".join(f"{height}x{width}" for height, width in config.image_sizes)
    parts = [
        f"# {title}",
        "CrossViT looks at an image at several scales, with small and with large patches, and lets the class token of"
        f" each scale attend to the patches of the next one ([paper]({PAPER}), Chen, Fan and Panda, ICCV 2021). This"
        f" is {f'`{variant}`' if variant else 'a CrossViT of its own shape'}"
        f" with {config.num_labels} classes: {record['parameters'] / 1e6:.1f} M parameters, {len(config.depth)}"
        f" stages, {config.num_branches} branches with images of {sizes} pixels.",
        "## Use",
        USAGE.format(checkpoint=repo_id or PLACEHOLDER),
        "## Where the weights are from",
        f"Converted from {source}.",
        proof_in_words(record),
    ]
    if published:
        top1 = published["imagenet_top1"]
        parts += [
            "The authors trained them on ImageNet-1k with the recipe of the paper. Published top-1 accuracy on its"
            f" validation images, not measured again for this checkpoint: {top1['paper']} % ([paper]({PAPER})),"
            f" {top1['timm']} % ([timm]({TIMM_RESULTS})).",
            "## Limits",
            "The classes are the 1000 of ImageNet: one object per image, of a choice that is no picture of the world."
            " The model has their biases and answers with one of them for any image.",
        ]
    else:
        parts += [
            "What they were trained on, under which license they are and how accurate they are is not recorded in the"
            " source: whoever publishes them should say it here."
        ]
    parts += ["## Citation", CITATION]
    return f"---\n{ModelCardData(**metadata)}\n---\n\n" + "\n\n".join(parts) + "\n"


def proof_in_words(record: dict[str, Any]) -> str:
    found = record["largest_logit_difference"]
    if found is None:
        return (
            "**Not proven:** timm cannot build a model of this shape, so that nothing could be compared with it. The"
            " names and shapes of all tensors were checked."
        )
    return (
        "The logits of this checkpoint and of timm's model with the source's weights were compared on fixed images:"
        f" they differ by {found['float32']:.1e} at most in float32 and by {found['float64']:.1e} in float64. See"
        " `conversion.json`."
    )
