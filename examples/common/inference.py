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
"""Any number of image files through a model: worker processes prepare batches while the model runs."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset, default_convert
from tqdm import tqdm

from .command_line import load_checkpoint
from .errors import CommandError
from .images import decode_image
from .workers import default_num_workers


TOP = 5  # labels of each image


def prepare(
    images: Sequence[dict[str, Any]], processor: Any, map_function: Any = map
) -> tuple[torch.Tensor, list[str | None]]:
    """
    The `pixel_values` (images, channels, height, width) of images, and the error of each that cannot be read, which
    is black in `pixel_values`. The images are as in [`decode_image`]; `map_function` may decode them in threads.
    """

    def decode(image: dict[str, Any]) -> tuple[PIL.Image.Image, str | None]:
        try:
            return decode_image(image), None
        except CommandError as error:
            return PIL.Image.new("RGB", (1, 1)), str(error)

    decoded, errors = zip(*map_function(decode, images))
    return processor(list(decoded), return_tensors="pt").pixel_values, list(errors)


class ImageFiles(Dataset):
    """Image files for a `DataLoader`, which asks for a batch at a time: the paths and what [`prepare`] returns."""

    def __init__(self, paths: Sequence[str | Path], processor: Any):
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: list[int]) -> tuple[list[str | Path], torch.Tensor, list[str | None]]:
        paths = [self.paths[index] for index in indices]
        return paths, *prepare([{"bytes": None, "path": str(path)} for path in paths], self.processor)


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The classifier, ready to run on the accelerator if there is one, and its image processor."""
    model, processor = load_checkpoint(args.model, args.dtype and getattr(torch, args.dtype))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.eval().to(device), processor


def predict(
    function: Callable[[Any, torch.Tensor], tuple[torch.Tensor, ...]],
    model: Any,
    processor: Any,
    paths: Sequence[str | Path],
    args: argparse.Namespace,
) -> Iterator[tuple[Any, ...]]:
    """
    Runs a model on image files, with the options of `add_predict_options` and a progress bar. Files that cannot be
    read are reported and left out.

    Args:
        function (`Callable`): of the model and `pixel_values`; returns tensors with a row for each image.
        model, processor: what [`load_model`] returns.
        paths (`Sequence[str | Path]`): the files.
        args (`argparse.Namespace`): the options.

    Yields:
        `tuple`: the path of an image and its rows, as lists or numbers, in the order of the files.
    """
    if args.compile:
        function = torch.compile(function)
    loader = DataLoader(
        ImageFiles(paths, processor),
        args.batch_size,
        num_workers=default_num_workers() if args.num_workers is None else args.num_workers,
        collate_fn=default_convert,  # they are batches already
        pin_memory=torch.accelerator.is_available(),
    )
    with tqdm(total=len(paths), unit="image") as progress:
        for batch, pixel_values, errors in loader:
            if args.compile and len(batch) < args.batch_size:  # another size would be compiled again
                padding = pixel_values.new_zeros(args.batch_size - len(batch), *pixel_values.shape[1:])
                pixel_values = torch.cat([pixel_values, padding])
            with torch.inference_mode():
                rows = function(model, pixel_values.to(model.device, non_blocking=True).to(model.dtype))
            for path, error, *values in zip(batch, errors, *(tensor.tolist() for tensor in rows)):
                if error is None:
                    yield path, *values
                else:
                    tqdm.write(f"left out {error}", file=sys.stderr)
            progress.update(len(batch))


def best_labels(logits: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The five best labels of each image and their scores, which are those of the pipeline of Transformers."""
    is_multi_label = config.problem_type == "multi_label_classification" or config.num_labels == 1
    scores = logits.float().sigmoid() if is_multi_label else logits.float().softmax(dim=-1)
    scores, labels = scores.topk(min(TOP, config.num_labels))
    return labels, scores
