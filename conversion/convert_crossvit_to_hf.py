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
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import open_checkpoint
from commands import ConversionError, check_output, run, whole_folder
from memory import page_out
from model_card import make_model_card
from proof import check_differences, in_words, largest_differences
from publishing import RECORD_NAME, Repository, add_repository_options
from reference_checkpoint import ReferenceCheckpoint, add_reference_options, read_reference
from sources import read_json
from transformers.image_utils import PILImageResampling

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
    parser.add_argument("output", type=Path, help="the folder to make")
    add_reference_options(parser)
    parser.add_argument("--labels", type=Path, help="the names of the classes: a line each, or a JSON list or object")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT, and REPO, if they exist")
    parser.add_argument("--push-to-hub", metavar="REPO", help="publish OUTPUT on the Hub as REPO (owner/name)")
    add_repository_options(parser)
    options = parser.parse_args()

    check_output(options.output, options.overwrite)
    repository = None
    if options.push_to_hub:
        repository = Repository(options.push_to_hub, options.private, options.overwrite)
    reference = read_reference(options.source, options)
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
    # The checkpoint carries its code, for users without this package
    model.config.auto_map = dict(AUTO_MAP)
    processor: Any = make_image_processor(reference)
    processor.auto_map = {"AutoImageProcessor": dict(REMOTE_CODE_CLASSES)}

    with whole_folder(output, overwrite) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for tensor in reference.tensors.values():
            page_out(tensor)
        # Only now, since memory is at its peak while weights are saved, and timm takes some
        set_labels(model.config, reference, labels)
        model.config.save_pretrained(folder)
        # What is compared is what was written
        differences = largest_differences(open_checkpoint(folder), reference.tensors)
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
        make_model_card(model.config, record, reference.published, repo_id).save(folder / "README.md")
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
    if len(names) != config.num_labels or len(set(names)) != len(names):
        duplicate = next((name for name in names if names.count(name) > 1), None)
        problem = f"{duplicate!r} twice" if duplicate is not None else f"{len(names)} names"
        raise ConversionError(
            f"{labels or 'config.json'} has {problem}, the model needs {config.num_labels} different ones"
        )
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def read_labels(path: Path) -> list[str]:
    """The names of classes in their order: lines, a JSON list, or a JSON object from indices to names."""
    if path.suffix != ".json":
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    names = read_json(path)
    if isinstance(names, dict) and sorted(names) == sorted(map(str, range(len(names)))):
        names = [names[str(index)] for index in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConversionError(f'{path} is neither a list ["cat", "dog"] nor an object {{"0": "cat", "1": "dog"}}')
    return names


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
    shortest_edge = preprocessing.get("resize_shortest_edge", math.floor(height / 0.875))
    if "crop_pct" in timm_config:
        shortest_edge = math.floor(height / timm_config["crop_pct"])
    crop_mode = timm_config.get("crop_mode", "center")
    interpolation = timm_config.get("interpolation", "bicubic")
    resample = getattr(PILImageResampling, interpolation.upper(), None)
    if crop_mode not in ("center", "squash") or resample is None:
        raise ConversionError(
            f"config.json asks for crop_mode {crop_mode!r} and interpolation {interpolation!r}, for which the image"
            " processor has no counterpart"
        )
    size = {"shortest_edge": shortest_edge}
    if height != width or crop_mode == "squash":
        size = {"height": height, "width": width}
    colors: dict[str, Any] = {
        f"image_{name}": list(timm_config[name]) for name in ("mean", "std") if name in timm_config
    }
    return CrossViTImageProcessor(
        size=size,
        crop_size={"height": height, "width": width},
        resample=resample,
        do_convert_rgb=config.num_channels == 3,
        **colors,
    )


if __name__ == "__main__":
    run(main)
