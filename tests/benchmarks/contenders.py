"""Who is measured: our CrossViT and its peers, of the same weights, doing the same work."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import timm
import torch
from reference import VARIANTS
from reference import architecture_of as timm_name
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm_reference import our_state_dict
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor, CrossViTImageProcessorPil


WEIGHTS_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
# By mode: each model runs in this mode but timm's, which is always eager; timm's in the mode is `timm_compiled`
CONTENDERS = {
    "eager": ("crossvit", "timm", "wrapper"),
    "compiled": ("crossvit", "timm", "timm_compiled", "wrapper_compiled"),
    "cuda_graphs": ("crossvit", "timm", "timm_compiled"),
    "checkpointing": ("crossvit", "timm"),  # timm's has no gradient checkpointing
}
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {"compiled": {}, "cuda_graphs": {"mode": "reduce-overhead"}}

Step = Callable[[], Any]


@dataclass(frozen=True)
class Cell:
    """What is measured at once, in rounds of all contenders."""

    variant: str
    task: str  # "inference", "training", "loading" or "preprocessing"
    batch_size: int  # 0: the largest that fits
    dtype: str = "float32"
    mode: str = "eager"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.variant} {self.task} {self.batch_size or 'largest'} {self.dtype} {self.mode}"


def make_inputs(cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels, at random and always the same."""
    options: dict[str, Any] = {"generator": torch.Generator(cell.device).manual_seed(0), "device": cell.device}
    side = VARIANTS[cell.variant]["preprocessing"]["input"]
    images = torch.randn(cell.batch_size, 3, side, side, dtype=WEIGHTS_DTYPE[cell.dtype], **options)
    return images, torch.randint(1000, (cell.batch_size,), **options)


def build_model(name: str, variant: dict[str, Any], reference: nn.Module) -> Any:
    """A contender's model with a copy of the weights of `reference`, timm's model of the variant."""
    reference = copy.deepcopy(reference)
    if name == "timm":
        return reference
    options: dict[str, Any] = {"num_labels": 1000}
    model: Any
    with torch.device("meta"):
        if name == "crossvit":
            model = CrossViTForImageClassification(CrossViTConfig(**variant["config"], **options))
        else:
            config = TimmWrapperConfig(architecture=timm_name(variant), **options)
            model = TimmWrapperForImageClassification(config)
    weights = our_state_dict(reference) if name == "crossvit" else reference.state_dict()
    model.load_state_dict(weights, assign=True)
    return model


def make_step(name: str, cell: Cell, reference: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> Step:
    """What a contender does over and over: it returns the logits."""
    images, labels = inputs
    model = build_model(name.removesuffix("_compiled"), VARIANTS[cell.variant], reference)
    model = model.to(cell.device, WEIGHTS_DTYPE[cell.dtype]).train(cell.task == "training")
    if cell.mode == "checkpointing" and name == "crossvit":
        model.gradient_checkpointing_enable()
    forward: Any = model
    if cell.mode in COMPILE_OPTIONS and name != "timm":
        forward = torch.compile(model, dynamic=False, **COMPILE_OPTIONS[cell.mode])

    def autocast() -> torch.autocast:
        return torch.autocast(cell.device, torch.bfloat16, enabled=cell.dtype == "autocast")

    @torch.inference_mode()
    def infer() -> torch.Tensor:
        if cell.mode == "cuda_graphs":
            torch.compiler.cudagraph_mark_step_begin()  # The outputs of the last step may be overwritten
        with autocast():
            outputs = forward(images)
        return outputs if name.startswith("timm") else outputs.logits

    def train() -> torch.Tensor:
        if cell.mode == "cuda_graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with autocast():
            if name.startswith("timm"):
                logits = forward(images)
                loss = nn.functional.cross_entropy(logits, labels)
            else:
                outputs = forward(images, labels=labels)
                loss, logits = outputs.loss, outputs.logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits.detach()

    if cell.task == "inference":
        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)  # So small that the numbers stay ordinary ones
    return train


def make_loading_steps(cell: Cell, reference: nn.Module, folder: Path) -> dict[str, Step]:
    """Loads a checkpoint of safetensors in `folder`, as users of each contender do."""
    name = timm_name(VARIANTS[cell.variant])
    ours, theirs, wrapped = folder / "crossvit", folder / "timm.safetensors", folder / "wrapper"
    build_model("crossvit", VARIANTS[cell.variant], reference).save_pretrained(ours)
    build_model("wrapper", VARIANTS[cell.variant], reference).save_pretrained(wrapped)
    save_file(reference.state_dict(), theirs)
    return {
        "crossvit": lambda: CrossViTForImageClassification.from_pretrained(ours),
        "timm": lambda: timm.create_model(name, checkpoint_path=theirs).eval(),
        "wrapper": lambda: TimmWrapperForImageClassification.from_pretrained(wrapped),
    }


def make_preprocessing_steps(cell: Cell) -> dict[str, Step]:
    """Makes pixel values of images as a folder of photos has them."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(cell.batch_size):
        # Smooth areas and grain
        coarse = PIL.Image.fromarray(generator.integers(256, size=(12, 16, 3), dtype=np.uint8))
        grain = generator.normal(scale=8, size=(375, 500, 3))
        pixels = np.asarray(coarse.resize((500, 375), PIL.Image.Resampling.BICUBIC)) + grain
        images.append(PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))

    variant = VARIANTS[cell.variant]
    side, edge = variant["preprocessing"]["input"], variant["preprocessing"]["resize_shortest_edge"]
    options: dict[str, Any] = {"size": {"shortest_edge": edge}, "crop_size": {"height": side, "width": side}}
    processor: Any = CrossViTImageProcessor(**options)
    pil_processor: Any = CrossViTImageProcessorPil(**options)
    pretrained_cfg = timm.get_pretrained_cfg(variant["timm_id"].removeprefix("timm/")).to_dict()
    transform = create_transform(**resolve_data_config(pretrained_cfg=pretrained_cfg))
    return {
        "crossvit": lambda: processor(images, return_tensors="pt")["pixel_values"],
        "crossvit_pil": lambda: pil_processor(images, return_tensors="pt")["pixel_values"],
        "timm": lambda: torch.stack([transform(image) for image in images]),
    }
