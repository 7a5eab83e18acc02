"""
Converts weights of the reference (IBM's, timm's, lucid-dl's) to a checkpoint of Transformers.

    python conversion/convert_crossvit_to_hf.py crossvit_15 checkpoints/crossvit_15
    python conversion/convert_crossvit_to_hf.py crossvit_15_224.pth checkpoints/crossvit_15
    python conversion/convert_crossvit_to_hf.py output/checkpoint.pth my-model --labels classes.txt

Nothing is written unless the logits equal the reference's. OUTPUT appears whole or not at all.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import open_checkpoint, write_weights
from commands import ConversionError, check_output, run, some, user_path, whole_folder
from model_card import make_model_card
from proof import check_differences, in_words, largest_differences
from publishing import RECORD_NAME, Repository, add_repository_options
from reference_checkpoint import ReferenceCheckpoint, add_reference_options, read_reference
from sources import read_json
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

import crossvit
from crossvit import CrossViTConfig, CrossViTImageProcessor
from crossvit.configuration_crossvit import AUTO_MAP
from crossvit.image_processing_pil_crossvit import REMOTE_CODE_CLASSES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        help="a variant (crossvit_15: timm's weights from the Hub), a repository of the Hub, an https URL, or the path"
        " of a file or of a folder of timm's; ./NAME is always a path",
    )
    parser.add_argument("output", type=user_path, help="the folder to make")
    add_reference_options(parser)
    parser.add_argument(
        "--labels", type=user_path, help="the names of the classes: a line each, or a JSON list or object"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT, and REPO, if they exist")
    parser.add_argument("--push-to-hub", metavar="REPO", help="publish OUTPUT on the Hub as REPO (owner/name)")
    add_repository_options(parser)
    options = parser.parse_args()

    check_output(options.output, options.overwrite)
    repository = None
    if options.push_to_hub:
        repository = Repository(options.push_to_hub, options.private, options.overwrite)
    reference = read_reference(options.source, options)
    if reference.source.path.resolve().is_relative_to(options.output.resolve()):
        raise ConversionError(f"{options.output} holds the source and is not overwritten")
    record = convert(reference, options.output, options.labels, options.push_to_hub, options.overwrite)
    shape = record["variant"] or "a CrossViT of its own shape"
    print(f"{options.output}: {shape}, {record['tensors']} tensors, {in_words(record['largest_logit_difference'])}")
    if repository:
        print(repository.publish(options.output))


def convert(
    reference: ReferenceCheckpoint,
    output: Path,
    labels: Path | None = None,
    repo_id: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """
    Makes a checkpoint of Transformers of one of the reference, in the folder `output`.

    Args:
        reference (`ReferenceCheckpoint`): what to convert.
        output (`Path`): the folder to make.
        labels (`Path`, *optional*): the file with the names of the classes.
        repo_id (`str`, *optional*): the repository of the Hub that the model card is for.
        overwrite (`bool`, *optional*): whether to replace an `output` that exists.

    Returns:
        `dict`: the contents of its conversion.json.

    Raises:
        `ConversionError`: when the logits differ from the reference's, or the labels do not fit. `output` is then as
            it was before.
    """
    model = reference.build_model()
    model.config.architectures = [type(model).__name__]
    model.config.dtype = reference.dtype
    set_labels(model.config, reference, labels)
    # The checkpoint carries its code, for users without this package
    model.config.auto_map = dict(AUTO_MAP)
    processor: Any = make_image_processor(reference)
    processor.auto_map = {"AutoImageProcessor": dict(REMOTE_CODE_CLASSES)}

    with whole_folder(output, overwrite) as folder:
        # What `save_pretrained` writes
        model.config.save_pretrained(folder)
        custom_object_save(model, folder)
        write_weights(model.state_dict(), folder / "model.safetensors")
        processor.save_pretrained(folder)
        # What is compared is what was written
        differences = largest_differences(open_checkpoint(folder), reference.tensors, reference.source.timm_config)
        check_differences(differences)

        record = {
            "source": reference.record,
            "variant": reference.variant["name"] if reference.variant else None,
            "tensors": len(reference.tensors),
            "parameters": sum(tensor.numel() for tensor in reference.tensors.values()),
            "dtype": str(reference.dtype).removeprefix("torch."),
            "largest_logit_difference": differences,
            "versions": {
                "crossvit": crossvit.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "timm": timm_version(),
            },
        }
        card = make_model_card(model.config, record, reference.published, repo_id)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def timm_version() -> str:
    import timm

    return timm.__version__


def set_labels(config: CrossViTConfig, reference: ReferenceCheckpoint, labels: Path | None):
    """
    Names the classes: from a file, or as a config.json of timm's does, or as ImageNet's if there are 1000 of them.
    Otherwise they keep the names that Transformers gives (LABEL_0, LABEL_1, ...).
    """
    timm_config = reference.source.timm_config
    timm_labels = timm_config.get("label_names") or timm_config.get("pretrained_cfg", {}).get("label_names")
    if labels is not None:
        names = read_labels(labels)
    elif timm_labels:
        names = timm_labels
    elif config.num_labels == 1000:
        names = imagenet_labels()
    else:
        return
    place = labels or "label_names of config.json"
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConversionError(f"{place} is no list of names")
    if len(names) != config.num_labels:
        raise ConversionError(f"{place} has {len(names)} names, the model {config.num_labels} classes")
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise ConversionError(f"{place} has the same name for several classes: {some(duplicates)}")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def read_labels(path: Path) -> list[str]:
    """The names of classes in their order: lines, a JSON list, or a JSON object from indices to names."""
    if path.suffix == ".json":
        names = read_json(path)
        if isinstance(names, dict):
            names = [names.get(str(index)) for index in range(len(names))]
        return names
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path} is no text in UTF-8: {error}") from error


def imagenet_labels() -> list[str]:
    """
    The names of ImageNet's 1000 classes, as ViT's checkpoints have them. Two are called "crane", the bird and the
    machine; the second one is "crane2", as in the data set on the Hub.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = [info.index_to_description(index) for index in range(1000)]
    names[517] = "crane2"
    return names


def make_image_processor(reference: ReferenceCheckpoint) -> CrossViTImageProcessor:
    """The image processor of a variant, or what a config.json of timm's says, or timm's and the paper's habits."""
    config = reference.config
    preprocessing = reference.variant["preprocessing"] if reference.variant else {}
    timm_config = reference.source.timm_config.get("pretrained_cfg", {})
    height, width = config.image_sizes[0]

    crop_pct = timm_config.get("crop_pct", 0.875)
    crop_mode = timm_config.get("crop_mode", "center")
    interpolation = timm_config.get("interpolation", "bicubic")
    resample = getattr(PILImageResampling, str(interpolation).upper(), None)
    if crop_mode not in ("center", "squash") or resample is None or not is_number(crop_pct) or not 0 < crop_pct <= 10:
        raise ConversionError(
            f"config.json asks for crop_mode {crop_mode!r}, crop_pct {crop_pct!r} and interpolation {interpolation!r},"
            " for which the image processor has no counterpart"
        )
    colors: dict[str, list[float]] = {}
    for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        values = timm_config.get(name)
        if values is None:
            # What images of other channels are normalised with is not known: ImageNet's average, for lack of better
            values = default if config.num_channels == 3 else [sum(default) / 3] * config.num_channels
        if (
            not isinstance(values, (list, tuple))
            or len(values) != config.num_channels
            or not all(map(is_number, values))
        ):
            raise ConversionError(f"config.json has {name} {values!r}, the images have {config.num_channels} channels")
        colors[name] = list(values)
    if 0 in colors["std"]:
        raise ConversionError(f"config.json has std {colors['std']}, by which pixels are divided")

    size = {"shortest_edge": math.floor(height / crop_pct)}
    if "crop_pct" not in timm_config and preprocessing:
        size = {"shortest_edge": preprocessing["resize_shortest_edge"]}
    if height != width or crop_mode == "squash":
        size = {"height": height, "width": width}
    return CrossViTImageProcessor(
        size=size,
        crop_size={"height": height, "width": width},
        resample=resample,
        image_mean=colors["mean"],
        image_std=colors["std"],
        do_convert_rgb=config.num_channels == 3,
    )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


if __name__ == "__main__":
    run(main)
