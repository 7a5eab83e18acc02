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
Converts CrossViT weights from the authors' code or timm to a Transformers checkpoint. The logits are first compared
with those of timm's model; nothing is written if they differ.

    python conversion/convert_crossvit_to_hf.py crossvit_15 checkpoints/crossvit_15            # timm's, from the Hub
    python conversion/convert_crossvit_to_hf.py crossvit_9_224.pth checkpoints/crossvit_9      # the authors'
    python conversion/convert_crossvit_to_hf.py output/checkpoint.pth my-crossvit --entry model_ema --labels names.txt
    python conversion/convert_crossvit_to_hf.py weights.safetensors my-crossvit --config config.json
    python conversion/convert_crossvit_to_hf.py crossvit_15 checkpoints/crossvit_15 --verify   # repeats the comparison
"""

import argparse
import contextlib
import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from model_card import make_model_card
from reference import (
    VARIANTS,
    ConversionError,
    create_timm_model,
    find_variant,
    logits_differences,
    run,
    shorten_list,
    to_timm_name,
)
from safetensors.torch import load_file
from transformers.utils import logging

import crossvit
from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.remote_code import AUTO_MAP
from crossvit.timm_checkpoints import (
    ARCHITECTURES,
    is_timm_config,
    read_image_processor_config,
    read_model_config,
)


WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
RECORD_NAME = "conversion.json"


@dataclass
class Source:
    """Where weights are, the config.json beside them, and what conversion.json says of them."""

    weights: Path
    config: Path | None
    record: dict[str, str]


def find_source(name: str, revision: str | None, downloads: Path) -> Source:
    """
    Finds the weights of a variant's name, a file, a folder, an https URL or a repository of the Hub, in this order.

    Args:
        name (`str`): the SOURCE of the command.
        revision (`str`, *optional*): of a repository.
        downloads (`Path`): the folder for what a URL leads to.
    """
    path = Path(name).expanduser()
    if name not in VARIANTS and path.is_file():
        return Source(path, None, {"file": path.name})
    if name not in VARIANTS and path.is_dir():
        found = [path / weights_name for weights_name in WEIGHTS_NAMES if (path / weights_name).is_file()]
        if not found:
            raise ConversionError(f"the folder {name} has neither {' nor '.join(WEIGHTS_NAMES)}")
        config = path / "config.json"
        return Source(found[0], config if config.is_file() else None, {"file": f"{path.name}/{found[0].name}"})
    if name.startswith("https://"):
        download = downloads / name.split("?")[0].split("/")[-1]
        torch.hub.download_url_to_file(name, str(download))
        return Source(download, None, {"url": name})

    repo_id = VARIANTS[name]["timm_id"] if name in VARIANTS else name
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise ConversionError(
            f"{name} is not a file, a folder, an https URL, a repository of the Hub or one of {', '.join(VARIANTS)}"
        )

    def download_file(file: str) -> Path | None:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf_hub_download(repo_id, file, revision=revision))

    config_file = download_file("config.json")
    weights = download_file(WEIGHTS_NAMES[0]) or download_file(WEIGHTS_NAMES[1])
    if weights is None:
        raise ConversionError(f"the repository {repo_id} has neither {' nor '.join(WEIGHTS_NAMES)}")
    return Source(weights, config_file, {"repository": repo_id, "revision": weights.parent.name})


def read_tensors(path: Path, entry: str | None = None) -> dict[str, torch.Tensor]:
    """
    Reads the weights of a file by timm's names, all in the widest of their types.

    Args:
        path (`Path`): of safetensors or of a pickle, of which nothing is executed.
        entry (`str`, *optional*): the entry of a training checkpoint that holds the weights.

    Raises:
        `ConversionError`: for a file that holds anything but finite floating-point weights.
    """
    contents = load_file(path) if path.suffix == ".safetensors" else read_pickle(path)
    state_dict = choose_entry(contents, entry, path.name)
    tensors = {to_timm_name(name): tensor for name, tensor in state_dict.items()}
    if not tensors or len(tensors) < len(state_dict):
        raise ConversionError(f"{path.name} contains no weights, or several that map to the same name")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ConversionError(
                f"{path.name}: {name} holds {tensor.dtype} values or NaN or Inf, which is not a weight"
            )
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def read_pickle(path: Path) -> Any:
    # torch does not look at checksums
    if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
        raise ConversionError(f"{path.name} is corrupt: the checksum of its record {damaged} does not match")
    try:
        # The reference's training script saves its options, a Namespace. Memory mapping would accept short records.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except OSError:
        raise
    # Of many types. Some messages are not repeated, since they advise to execute the pickle.
    except Exception as error:
        if harmful := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ConversionError(
                f"{path.name}: refusing to load a pickle that references {harmful[1]}; no code was executed. Save only"
                " the state dict."
            ) from error
        reason = type(error).__name__ if "weights_only" in str(error) or isinstance(error, KeyError) else error
        raise ConversionError(f"{path.name} is corrupt or not a file of weights: {reason}") from error


def choose_entry(checkpoint: Any, entry: str | None, name: str) -> Mapping[str, torch.Tensor]:
    """The state dict in the contents of a file, which are one or have them as entries."""

    def is_state_dict(value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(tensor, torch.Tensor) for tensor in value.values())

    if is_state_dict(checkpoint) and entry is None:
        return checkpoint
    values = checkpoint.items() if isinstance(checkpoint, Mapping) else ()
    entries = [key for key, value in values if is_state_dict(value) and value]
    if entry in entries or (entry is None and len(entries) == 1):
        return checkpoint[entry or entries[0]]
    found = f"state dicts under {shorten_list(entries, 9)}: choose one with --entry" if entries else "no state dict"
    raise ConversionError(f"{name} contains {found}")


def find_problems(tensors: dict[str, torch.Tensor], timm_model: torch.nn.Module) -> list[str]:
    """How the names and shapes of tensors differ from those of a model of timm's."""
    shapes, expected = ({name: tuple(t.shape) for name, t in d.items()} for d in (tensors, timm_model.state_dict()))
    return [
        *(f"{name} is missing" for name in expected if name not in shapes),
        *(f"{name} is unknown" for name in shapes if name not in expected),
        *(
            f"{name} has shape {shapes[name]} instead of {expected[name]}"
            for name in expected
            if name in shapes and shapes[name] != expected[name]
        ),
    ]


def recognize(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a config.json of timm's would say of the variant whose shapes are nearest to those of the tensors."""
    num_classes = len(tensors["head.0.bias"]) if "head.0.bias" in tensors else 1000
    candidates = []
    for architecture in ARCHITECTURES:
        pretrained_cfg = timm.models.get_pretrained_cfg(architecture).to_dict()
        candidates.append({"architecture": architecture, "num_classes": num_classes, "pretrained_cfg": pretrained_cfg})
    return min(candidates, key=lambda candidate: len(find_problems(tensors, timm_model_of(candidate))))


def timm_model_of(timm_config: dict[str, Any]) -> Any:
    """The model that timm builds from a config.json, without weights (on the meta device)."""
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        Path(folder, "config.json").write_text(json.dumps(timm_config), encoding="utf-8")
        return timm.create_model(f"local-dir:{folder}")


def read_labels(path: Path, num_labels: int) -> dict[int, str]:
    """The names of the classes: a line each, or a JSON list, or a JSON object from indices to names."""
    text = path.read_text(encoding="utf-8-sig")
    names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    if isinstance(names, dict):
        names = [names.get(str(index)) for index in range(len(names))]
    if len(names) != num_labels or len({name for name in names if name}) != num_labels:
        raise ConversionError(f"{path} must have a different name for each of {num_labels} classes, it has {names}")
    return dict(enumerate(names))


def read_source(
    options: argparse.Namespace, downloads: Path
) -> tuple[CrossViTForImageClassification, Any, dict[str, Any]]:
    """
    The model and image processor of a source, after a comparison of their logits with those of timm's model.

    Returns:
        `tuple`: the model, the image processor, and the contents of conversion.json.

    Raises:
        `ConversionError`: for weights that are not those of the configuration, or other logits than timm's.
    """
    source = find_source(options.source, options.revision, downloads)
    tensors = read_tensors(source.weights, options.entry)
    config_file = options.config or source.config
    timm_config = json.loads(config_file.read_text(encoding="utf-8")) if config_file else {}
    if options.config and not is_timm_config(timm_config):
        config = CrossViTConfig.from_pretrained(options.config)
        timm_model: Any = create_timm_model(config)
        channels, (height, width) = config.num_channels, config.image_sizes[0]
        crop = {"crop_pct": 0.875} if height == width else {"crop_pct": 1.0, "crop_mode": "squash"}
        timm_config = {"pretrained_cfg": {"input_size": (channels, height, width), **crop}}
    else:
        if not is_timm_config(timm_config):
            timm_config = recognize(tensors)
        config = CrossViTConfig(**read_model_config(timm_config))
        timm_model = timm_model_of(timm_config)
    processor = CrossViTImageProcessor(**read_image_processor_config(timm_config))
    if problems := find_problems(tensors, timm_model):
        expected = timm_config.get("architecture", "model of this configuration")
        raise ConversionError(
            f"{source.weights.name} is not a whole {expected}: {shorten_list(problems)}. Describe another architecture"
            " with --config."
        )
    if options.labels:
        config.id2label = read_labels(options.labels, config.num_labels)
        config.label2id = {name: index for index, name in config.id2label.items()}

    dtype = next(iter(tensors.values())).dtype
    model = CrossViTForImageClassification.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    if options.verify:
        model = load_equal(str(options.output), model)
    timm_model.load_state_dict(tensors, assign=True)
    differences = logits_differences(model, timm_model, config)
    variant = find_variant(config)
    with open(source.weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = {"entry": options.entry} if options.entry else {}
    record = {
        "source": {**source.record, **entry, "sha256": digest},
        "variant": variant["name"] if variant else None,
        "tensors": len(tensors),
        "parameters": model.num_parameters(),
        "dtype": str(dtype).removeprefix("torch."),
        "largest_logit_difference": differences,
        "versions": {module.__name__: module.__version__ for module in (crossvit, transformers, torch, timm)},
    }
    return model, processor, record


def save(model: CrossViTForImageClassification, processor: Any, record: dict[str, Any], options: argparse.Namespace):
    """Writes the checkpoint with its code, card and record into a folder that appears when it is complete."""
    # The checkpoint carries its code, for users without this package
    model.config.auto_map = processor.auto_map = dict(AUTO_MAP)
    output = options.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        unfinished = Path(folder, output.name)
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        card = make_model_card(model.config, record, options.push_to_hub)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        record["files"] = sorted(path.name for path in unfinished.iterdir())
        (unfinished / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        check_output(output, options.overwrite)  # again, for what has been put there in the meantime
        if output.exists():
            shutil.rmtree(output)
        unfinished.rename(output)


def check_output(output: Path, overwrite: bool):
    """Refuses to replace anything but a folder with the files of an earlier conversion and no others."""
    if not output.exists():
        return
    if not overwrite:
        raise ConversionError(f"{output} exists: choose another folder or pass --overwrite")
    try:
        written = json.loads((output / RECORD_NAME).read_text(encoding="utf-8"))["files"]
        foreign = [path.name for path in output.iterdir() if path.name not in (*written, RECORD_NAME) or path.is_dir()]
    except (OSError, ValueError, LookupError, TypeError):
        foreign = ["no conversion.json of this command"]
    if foreign or output.is_symlink():
        raise ConversionError(
            f"{output} is not replaced, since this command did not write it: {shorten_list(foreign)}"
        )


def load_equal(checkpoint: str, model: CrossViTForImageClassification) -> CrossViTForImageClassification:
    """Loads a checkpoint, whose weights must be those of a model bit by bit."""
    loaded = CrossViTForImageClassification.from_pretrained(checkpoint, dtype="auto")
    tensors, expected = loaded.state_dict(), model.state_dict()
    different = [name for name in expected if name not in tensors or not torch.equal(tensors[name], expected[name])]
    if different:
        raise ConversionError(f"{checkpoint} has other weights than the source: {shorten_list(different)}")
    return loaded


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        help="the name of a variant, a file (.pth, .safetensors), a folder of timm's, an https URL or a repository of"
        " the Hub; ./NAME is always a path",
    )
    parser.add_argument("output", type=Path, help="the folder to create, or the checkpoint to verify")
    parser.add_argument("--revision", help="branch, tag or commit of the source's repository")
    parser.add_argument(
        "--config",
        type=Path,
        help="our or timm's config.json; needed if the architecture cannot be inferred from the shapes",
    )
    parser.add_argument("--entry", help="which weights of a training checkpoint: model, model_ema, ...")
    parser.add_argument("--labels", type=Path, help="names of the classes: a line each, or a JSON list or object")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in OUTPUT")
    parser.add_argument(
        "--verify", action="store_true", help="compare the checkpoint OUTPUT with SOURCE, write nothing"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="publish OUTPUT as this repository (owner/name)")
    parser.add_argument("--private", action="store_true", help="create REPO as a private repository")
    options = parser.parse_args()
    logging.disable_progress_bar()

    if not options.verify:
        check_output(options.output, options.overwrite)
    if options.push_to_hub:
        HfApi().whoami()  # Without a token, fail before the work
    with tempfile.TemporaryDirectory() as downloads:
        model, processor, record = read_source(options, Path(downloads))
    if not options.verify:
        save(model, processor, record, options)
    found = record["largest_logit_difference"]
    print(
        f"{options.output}: {record['variant'] or 'a CrossViT'}, {record['tensors']} tensors, largest difference from"
        f" timm's logits {found['float32']:.1e} in float32 and {found['float64']:.1e} in float64"
    )
    if options.push_to_hub:
        HfApi().create_repo(options.push_to_hub, private=options.private, exist_ok=True)
        commit = HfApi().upload_folder(
            repo_id=options.push_to_hub, folder_path=options.output, commit_message="Upload the converted checkpoint"
        )
        print(f"{options.push_to_hub}: published, {commit.commit_url}")


if __name__ == "__main__":
    run(main)
