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
"""
Converts a Transformers checkpoint to one for timm or the authors' code. The weights stay the same, bit for bit. The
logits are first compared with those of timm's model; nothing is written if they differ.

    python conversion/convert_hf_to_timm.py my-crossvit my-timm-crossvit
    python conversion/convert_hf_to_timm.py me/my-crossvit my-ibm-crossvit --format ibm
"""

import argparse
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from reference import ConversionError, create_timm_model, logits_differences, run, shorten_list, to_transformers_name
from transformers.image_utils import PILImageResampling
from transformers.utils import logging

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor


def timm_preprocessing(config: CrossViTConfig, processor: Any) -> dict[str, Any]:
    """
    What timm's `pretrained_cfg` says of an image processor.

    Raises:
        `ConversionError`: for an image processor that timm's evaluation transform does not equal.
    """
    height, width = config.image_sizes[0]
    crop, size = processor.crop_size, processor.size
    if (
        not (processor.do_resize and processor.do_center_crop and processor.do_rescale and processor.do_normalize)
        or not math.isclose(processor.rescale_factor, 1 / 255)
        or (crop.height, crop.width) != (height, width)
        or not (size.height or (size.shortest_edge and height == width))
    ):
        raise ConversionError(
            "preprocessor_config.json does not describe timm's evaluation transform: images that are resized, cropped"
            f" to {height}x{width}, rescaled by 1/255 and normalized"
        )
    resized = (size.height, size.width) if size.height else (size.shortest_edge, size.shortest_edge)
    # timm divides by this share and rounds down
    shares = [1.0, 0.875, *(side / (edge + 0.5) for side, edge in zip((height, width), resized))]
    for crop_pct in shares:
        if resized == (math.floor(height / crop_pct), math.floor(width / crop_pct)):
            return {
                "crop_pct": crop_pct,
                "crop_mode": "squash" if size.height else "center",
                "interpolation": PILImageResampling(processor.resample).name.lower(),
                "mean": tuple(processor.image_mean),
                "std": tuple(processor.image_std),
            }
    raise ConversionError(f"timm has one share of the crop for both sides, not a crop of {crop} from {size}")


def convert(options: argparse.Namespace):
    if options.output.exists():
        raise ConversionError(f"{options.output} exists: choose another folder")
    loaded: Any = CrossViTForImageClassification.from_pretrained(
        options.checkpoint, revision=options.revision, dtype="auto", output_loading_info=True
    )
    model, info = loaded
    if problems := [name for names in info.values() for name in names]:
        raise ConversionError(
            f"{options.checkpoint} is not a whole classifier: {shorten_list(sorted(map(str, problems)))}"
        )
    weights, config = model.state_dict(), model.config
    timm_model = create_timm_model(config)
    tensors = {name: weights[to_transformers_name(name)] for name in timm_model.state_dict()}
    timm_model.load_state_dict(tensors, assign=True)
    differences = logits_differences(model, timm_model, config)

    output = options.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        unfinished = Path(folder, output.name)
        if options.format == "timm":
            processor = CrossViTImageProcessor.from_pretrained(options.checkpoint, revision=options.revision)
            # What timm knows of the published weights is not known of these
            pretrained_cfg = {"tag": "", "license": None, **timm_preprocessing(config, processor)}
            label_names: Any = [config.id2label[index] for index in range(config.num_labels)]
            if all(name == f"LABEL_{index}" for index, name in enumerate(label_names)):
                label_names = None
            model_config = {"pretrained_cfg": pretrained_cfg, "label_names": label_names}
            timm.models.save_for_hf(timm_model, str(unfinished), model_config, safe_serialization=True)
        else:
            unfinished.mkdir()
            ibm_tensors = {re.sub(r"^(cls_token|pos_embed)_", r"\1.", name): t for name, t in tensors.items()}
            torch.save(ibm_tensors, unfinished / "model.pth")
        unfinished.rename(output)
    print(
        f"{options.output}: {len(tensors)} tensors, largest difference from timm's logits"
        f" {differences['float32']:.1e} in float32 and {differences['float64']:.1e} in float64"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder or repository of the Hub with a CrossViTForImageClassification")
    parser.add_argument("output", type=Path, help="the folder to create")
    parser.add_argument("--format", choices=("timm", "ibm"), default="timm", help="weight naming scheme")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    options = parser.parse_args()
    logging.disable_progress_bar()
    convert(options)


if __name__ == "__main__":
    run(main)
