"""Checkpoints of Transformers, as the commands read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from commands import ConversionError, in_one_line, some
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from memory import page_out
from sources import of_one_type, read_tensors
from weight_names import from_transformers_name

from crossvit import CrossViTConfig, CrossViTForImageClassification


SAFETENSORS_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]


def find_checkpoint(checkpoint: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: the given one, or that of the files downloaded from a repository of the Hub."""
    folder = Path(checkpoint).expanduser()
    if not folder.exists() and checkpoint.count("/") == 1 and not checkpoint.startswith((".", "/", "~")):
        try:
            folder = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=FILES))
        except (HTTPError, OSError, ValueError) as error:
            raise ConversionError(
                f"{checkpoint} is no folder, and cannot be had from the Hub: {in_one_line(error)}"
            ) from error
    for name in FILES[:2]:
        if not (folder / name).is_file():
            raise ConversionError(f"{checkpoint} is no checkpoint of Transformers: it has no {name}")
    return folder


def open_checkpoint(folder: Path) -> CrossViTForImageClassification:
    """
    The classifier of a folder as it is written, its weights left on the disk until they are used.

    Raises:
        `ConversionError`: for what is no sound classifier of this package.
    """
    tensors, _ = read_tensors(folder / "model.safetensors")
    try:
        config_dict, _ = CrossViTConfig.get_config_dict(folder)
        if config_dict.get("model_type") != CrossViTConfig.model_type:
            raise ConversionError(f"{folder} has the model type {config_dict.get('model_type')!r}, not 'crossvit'")
        config = CrossViTConfig.from_pretrained(folder)
        if sum(map(sum, config.depth)) > len(tensors):  # do not even try to build it
            raise ConversionError(f"{folder} does not fit its config.json: {len(tensors)} tensors for {config.depth}")
        with torch.device("meta"):
            model = CrossViTForImageClassification(config)
    except (ConversionError, OSError):
        raise
    except Exception as error:  # of all kinds, for what may be in a file
        raise ConversionError(f"config.json of {folder} describes no CrossViT: {in_one_line(error)}") from error

    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    wrong = [name for name in {**expected, **tensors} if name not in tensors or name not in expected]
    wrong += [name for name in expected if name in tensors and tensors[name].shape != expected[name]]
    if wrong:
        raise ConversionError(f"{folder} does not fit its config.json: missing, unknown or misshapen {some(wrong)}")
    model.load_state_dict(of_one_type(tensors), assign=True)
    return model.eval()


def write_weights(tensors: Mapping[str, torch.Tensor], path: Path):
    """
    Writes tensors of one type as safetensors' `save_file` does, byte by byte the same, but one after the other: the
    library has all of them in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype = SAFETENSORS_TYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in sorted(tensors):
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
            page_out(tensors[name])


def reference_tensors(model: CrossViTForImageClassification, format_name: str = "timm") -> dict[str, torch.Tensor]:
    """The weights of a model by the names that they have in a format of the reference."""
    return {
        from_transformers_name(name, model.config, format_name): tensor for name, tensor in model.state_dict().items()
    }
