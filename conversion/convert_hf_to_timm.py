"""
Converts a CrossViT checkpoint of Transformers to one of the reference: the inverse of convert_crossvit_to_hf.py.

    python conversion/convert_hf_to_timm.py my-crossvit my-timm-crossvit
    python -c "import timm; timm.create_model('local-dir:my-timm-crossvit', pretrained=True)"
    python conversion/convert_hf_to_timm.py my-crossvit my-ibm-crossvit --format ibm

OUTPUT is a folder: for timm with config.json and model.safetensors, for IBM's code with model.pth. Nothing is written
unless timm's model takes the weights and gives the same logits.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from architecture import find_variant, nearest_variant
from checkpoints import find_checkpoint, open_checkpoint, reference_tensors
from commands import ConversionError, check_output, in_one_line, run, user_path, whole_folder
from proof import check_differences, in_words, largest_differences, timm_options
from safetensors.torch import save_file
from transformers.image_utils import PILImageResampling
from variants import VARIANTS, timm_name

from crossvit import CrossViTConfig, CrossViTImageProcessor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder or repository of the Hub with a CrossViTForImageClassification")
    parser.add_argument("output", type=user_path, help="the folder to make")
    parser.add_argument("--format", choices=("timm", "ibm"), default="timm", help="whose names the weights get")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUTPUT that exists")
    options = parser.parse_args()

    check_output(options.output, options.overwrite)
    checkpoint = find_checkpoint(options.checkpoint, options.revision)
    model = open_checkpoint(checkpoint)
    check_convertible(model.config)
    if options.format == "timm":
        timm_config = make_timm_config(model.config, load_image_processor(checkpoint))
    found = largest_differences(model, reference_tensors(model))
    if found is None and options.format == "timm":
        raise ConversionError(
            f"timm cannot build a model of this shape ({nearest_variant(model.config)}); see --format ibm"
        )
    check_differences(found)

    tensors = reference_tensors(model, options.format)
    with whole_folder(options.output, options.overwrite) as folder:
        if options.format == "timm":
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(timm_config, indent=2) + "\n", encoding="utf-8")
        else:
            try:
                torch.save(tensors, folder / "model.pth")
            except RuntimeError as error:  # torch's for a full disk
                raise ConversionError(f"{options.output} cannot be written: {in_one_line(error)}") from error
    print(f"{options.output}: {len(tensors)} tensors, {in_words(found)}")


def check_convertible(config: CrossViTConfig):
    """Raises `ConversionError` for a model that the reference's code would run otherwise, or not at all."""
    for name, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if getattr(config, name) != value:
            raise ConversionError(f"the model has {name} {getattr(config, name)}, the reference has {value} alone")
    if any(0 in layers for *layers, _ in config.depth):
        raise ConversionError(
            f"the reference cannot run a branch without layers in a stage, as in depth {config.depth}"
        )


def load_image_processor(checkpoint: Path) -> Any:
    try:
        return CrossViTImageProcessor.from_pretrained(checkpoint)
    except Exception as error:  # of all kinds, for what may be in a file
        raise ConversionError(f"{checkpoint} has no sound preprocessor_config.json: {in_one_line(error)}") from error


def make_timm_config(config: CrossViTConfig, processor: Any) -> dict[str, Any]:
    """
    The config.json of timm for a model and its image processor.

    Raises:
        `ConversionError`: for an image processor that does what timm's evaluation transform cannot.
    """
    height, width = config.image_sizes[0]
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if (
        not all(getattr(processor, step) for step in steps)
        or not math.isclose(processor.rescale_factor, 1 / 255)
        or (processor.crop_size.height, processor.crop_size.width) != (height, width)
        or not (processor.size.shortest_edge or (processor.size.height, processor.size.width) == (height, width))
        or {len(processor.image_mean), len(processor.image_std)} != {config.num_channels}
    ):
        raise ConversionError(
            "preprocessor_config.json does not make what timm's transform makes: images that are resized, cropped to"
            f" {height}x{width}, rescaled by 1/255 and normalised in {config.num_channels} channels"
        )
    variant = find_variant(config)
    first_conv = "patch_embed.{}.proj.0" if config.multi_conv else "patch_embed.{}.proj"
    timm_config: dict[str, Any] = {
        "architecture": timm_name(variant or VARIANTS["crossvit_15_dagger" if config.multi_conv else "crossvit_15"]),
        "num_classes": config.num_labels,
        "num_features": sum(config.embed_dim),
        "pretrained_cfg": {
            "num_classes": config.num_labels,
            "input_size": [config.num_channels, height, width],
            "fixed_input_size": True,
            "crop_pct": crop_share(processor),
            "crop_mode": "center" if processor.size.shortest_edge else "squash",
            "interpolation": PILImageResampling(processor.resample).name.lower(),
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "first_conv": [first_conv.format(0), first_conv.format(1)],
            "classifier": ["head.0", "head.1"],
        },
    }
    id2label: Any = config.id2label
    names = [id2label.get(index, f"LABEL_{index}") for index in range(config.num_labels)]
    if names != [f"LABEL_{index}" for index in range(config.num_labels)]:
        timm_config["label_names"] = names
    if variant is None:
        timm_config["model_args"] = timm_options(config)
    return timm_config


def crop_share(processor: Any) -> float:
    """timm's `crop_pct`: the share of the resized image that the crop keeps, from which timm computes the former."""
    if not processor.size.shortest_edge:
        return 1.0
    side, edge = processor.crop_size.height, processor.size.shortest_edge
    return next(share for share in (1.0, 0.875, side / (edge + 0.5)) if math.floor(side / share) == edge)


if __name__ == "__main__":
    run(main)
