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
"""Which images a training sees, in which order and with which random numbers, from disk and from a stream."""

import copy
import itertools
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import ImageDatasetError


if TYPE_CHECKING:  # a Trainer of other data needs no such library
    import datasets


class ImageDataset(torch.utils.data.Dataset):
    """Rows on disk. An item is asked for by its index, or for training by what an [`AugmentationSampler`] draws."""

    def __init__(self, examples: "datasets.Dataset", repeats: int = 1):
        self.examples = examples
        self.repeats = repeats

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: int | tuple[int, int, int]) -> dict[str, Any]:
        if isinstance(item, tuple):
            index, *draw = item
            return {**self.examples[index], "draw": tuple(draw)}
        return {**self.examples[item], "index": item}


class AugmentationSampler(torch.utils.data.Sampler):
    """
    Draws images for training: (index, epoch, repeat), from which their augmentation follows as well, whatever process
    or worker computes it, before or after a restart.

    An epoch has as many draws as there are images. With repeated augmentation (Hoffer et al. 2020, as in DeiT) it
    shows a part of them, each `repeats` times: in as many batches that follow one another, so that no batch has an
    image twice. The order is that of a stream of one shard whose buffer holds all images.

    Args:
        length (`int`): number of images.
        seed (`int`): of the order.
        repeats (`int`): how often an image is drawn when its turn comes.
        batch_size (`int`): images per device and step.
    """

    def __init__(self, length: int, seed: int, repeats: int, batch_size: int):
        import datasets

        self.length, self.repeats, self.batch_size = length, repeats, batch_size
        indices = datasets.Dataset.from_dict({"index": np.arange(length)}).to_iterable_dataset()
        self.order = indices.shuffle(seed=seed, buffer_size=length + 1)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        self.order.set_epoch(self.epoch)
        indices = (row["index"] for row in self.order)
        for index, repeat in itertools.islice(repeated(indices, self.repeats, self.batch_size), self.length):
            yield index, self.epoch, repeat


def repeated(items: Iterable[Any], repeats: int, batch_size: int) -> Iterator[tuple[Any, int]]:
    """Batches of items, each batch `repeats` times in a row, with the number of the repetition."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, batch_size)):
        for repeat in range(repeats):
            for item in batch:
                yield item, repeat


class ImageStream(torch.utils.data.IterableDataset):
    """
    Rows of a stream; for training without an end, epoch after epoch, each in an order of its own. So neither the
    number of processes nor that of workers makes an image come twice or not at all, and a resumed run goes on where
    it stopped.

    Each process reads the rows of all and decodes its own; the shards are divided among the workers of a process.

    Args:
        examples (`datasets.IterableDataset`): the rows.
        training (`bool`): whether to go on for ever, with augmentation.
        repeats (`int`), batch_size (`int`): as in [`AugmentationSampler`].
    """

    def __init__(
        self, examples: "datasets.IterableDataset", training: bool = False, repeats: int = 1, batch_size: int = 1
    ):
        self.examples, self.training, self.repeats, self.batch_size = examples, training, repeats, batch_size
        self.skipped_batches = 0  # of all processes together, whose images nobody will look at
        self.global_batch_size = batch_size
        self.ended = False  # a training that was over when it was resumed would take one step too many

    def skip(self, batches: int, global_batch_size: int) -> None:
        """Lets the images of the first batches go undecoded: a resumed training only counts them."""
        self.skipped_batches, self.global_batch_size = batches, global_batch_size

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        worker = torch.utils.data.get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        if workers > self.examples.num_shards:
            raise ImageDatasetError(
                f"a stream of {self.examples.num_shards} shards takes at most as many workers, got"
                f" --dataloader_num_workers {workers}"
            )
        if not self.training:
            for count, example in enumerate(self.examples):
                yield {**example, "index": count * workers + worker_id}
            return
        if self.ended:
            return
        examples = copy.deepcopy(self.examples)  # workers share the epoch of the original
        # The workers bring the batches in turn
        skipped = len(range(worker_id, self.skipped_batches, workers)) * self.global_batch_size
        size = None  # of an epoch, known after the first; of workers it varies, as they get other shards
        for epoch in itertools.count():
            if size is not None and skipped >= size:  # nothing of it will be looked at
                yield from itertools.repeat(None, size)
                skipped -= size
                continue
            examples.set_epoch(epoch)
            count = 0
            for example, repeat in repeated(examples, self.repeats, self.batch_size):
                yield {**example, "draw": (epoch, repeat)} if count >= skipped else None
                count += 1
            if not count:
                raise ImageDatasetError("the stream has no images")
            size, skipped = count if workers == 1 else None, max(0, skipped - count)


def augmentation_seed(seed: int, draw: tuple[int, ...], content: bytes) -> int:
    """The seed of the augmentation of an image: of the run, the draw and the image alone, wherever it is made."""
    numbers = np.array([seed, *draw, zlib.crc32(content)], dtype=np.uint64)
    return int(np.random.SeedSequence(numbers.tolist()).generate_state(1, np.uint64)[0] >> 1)


__all__ = ["AugmentationSampler", "ImageDataset", "ImageStream"]
