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
"""Streams: each process and each of its workers reads its own part, and every image comes once in an epoch."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, seed_worker


ROWS_AT_ONCE = 32  # read from a stream; transforms get one at a time


class ImageStream(IterableDataset):
    """
    The part of a stream that a process, or one of its workers, reads: whole files if there are enough of them for the
    processes, and then for the workers, otherwise every n-th row.

    Args:
        stream (`datasets.IterableDataset`):
            The rows. Their images are not decoded, so that neither shuffling nor leaving out rows costs much.
        transform (`Callable`):
            Takes rows as lists by column, as `datasets.Dataset.with_transform` does, and returns them likewise.
        shuffle_buffer_size (`int`, *optional*):
            Number of rows of a process that are shuffled at a time, each epoch in another way. By default, rows keep
            their order.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order.
    """

    def __init__(
        self, stream: Any, transform: Callable[[dict], dict], shuffle_buffer_size: int | None = None, seed: int = 0
    ):
        self.stream, self.transform = stream, transform
        self.shuffle_buffer_size, self.seed = shuffle_buffer_size, seed
        self.process_index, self.num_processes = 0, 1
        # Shared with workers, which may outlive an epoch: the epoch, and how many rows of each part are left out
        self.position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def move_to(self, epoch: int, rows: int = 0) -> None:
        """The next iteration is that of an `epoch`. The first `rows` of each part are `None`, and are not decoded."""
        self.position[0], self.position[1] = epoch, rows

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        epoch, num_skipped = self.position.tolist()
        worker = get_worker_info()
        worker_index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        stream = self.stream
        if self.shuffle_buffer_size is not None:  # in every part alike, or rows would be lost
            stream = stream.shuffle(self.seed + epoch, buffer_size=max(self.shuffle_buffer_size // num_workers, 1))
        step, offset = 1, 0
        for index, parts in ((self.process_index, self.num_processes), (worker_index, num_workers)):
            if step == 1 and stream.num_shards >= parts:
                stream = stream.shard(parts, index, contiguous=False)
            else:
                step, offset = step * parts, offset * parts + index
        # In batches, for which `datasets` does not share the stream among workers itself: some would get nothing
        rows = (row for batch in stream.iter(ROWS_AT_ONCE) for row in rows_of(batch))
        for number, row in enumerate(islice(rows, offset, None, step)):
            yield None if number < num_skipped else self.transformed(row)

    def transformed(self, row: dict[str, Any]) -> dict[str, Any]:
        (row,) = rows_of(self.transform({name: [value] for name, value in row.items()}))
        return row

    def first(self) -> dict[str, Any]:
        """The first row of the whole stream."""
        return self.transformed(rows_of(next(iter(self.stream.iter(1))))[0])


def rows_of(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values)) for values in zip(*batch.values())]


class StreamLoader:
    """
    The batches of an [`ImageStream`], as many in each process, so that no process waits for another at the end of an
    epoch, or ends it early. A process that has no images left gets padding: images of zeros with labels of -100, which
    have no loss.

    The loader knows where it stands in the stream: after an interruption, an iteration continues with the next batch.

    Args:
        dataset ([`ImageStream`]): the stream.
        accelerator (`Accelerator`): the processes.
        batch_size (`int`): number of images per batch.
        collate_fn (`Callable`): makes a batch, a dictionary of tensors, from a list of rows.
        equal_batches (`bool`, *optional*, defaults to `False`):
            Whether the batches of all processes are padded to the same length, as [`~StreamLoader.gather`] needs it.
        multiple (`int`, *optional*, defaults to 1):
            The number of batches in an epoch is padded to a multiple of this number, for gradient accumulation.
        kwargs: as for `torch.utils.data.DataLoader`.

    Raises:
        `ValueError`: if an epoch has no batch.
    """

    def __init__(
        self,
        dataset: ImageStream,
        accelerator: Accelerator,
        batch_size: int,
        collate_fn: Callable[[list], dict[str, torch.Tensor]],
        equal_batches: bool = False,
        multiple: int = 1,
        **kwargs,
    ):
        dataset.process_index, dataset.num_processes = accelerator.process_index, accelerator.num_processes
        self.dataset, self.accelerator, self.collate_fn = dataset, accelerator, collate_fn
        self.equal_batches, self.multiple = equal_batches, multiple
        self.epoch, self.step = 0, 0  # of the next batch
        self.steps_per_epoch: int | None = None  # unknown in the first one
        self.is_finished = False
        self.lengths: list[int] = []  # of the current batch in each process, without padding
        seed_workers = partial(seed_worker, num_workers=kwargs.get("num_workers", 0), rank=accelerator.process_index)
        self.loader: DataLoader = DataLoader(
            dataset,
            batch_size,
            collate_fn=self.collate,
            worker_init_fn=seed_workers,
            generator=torch.Generator(),  # the global one would differ after an interruption
            **kwargs,
        )

    def collate(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        return {} if rows[0] is None else self.collate_fn(rows)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while not self.is_finished:
            start = self.step
            for batch in self.epoch_from(start):
                self.step += 1
                yield batch
            is_empty = self.step == start
            if self.step == 0:
                raise ValueError("The stream has no images, or fewer than a batch if incomplete batches are dropped.")
            self.epoch, self.step, self.steps_per_epoch = self.epoch + 1, 0, self.step
            if not is_empty:  # otherwise, the interruption was at the end of an epoch
                return

    def epoch_from(self, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of the current epoch after the first `start` ones."""
        self.loader.generator.manual_seed(self.dataset.seed + self.epoch)
        # Each worker has made at least as many batches: those of these rows need not be made again
        batches_per_worker = start // max(self.loader.num_workers, 1)
        self.dataset.move_to(self.epoch, batches_per_worker * self.loader.batch_size)
        batches, template = iter(self.loader), None
        for number in count():
            batch = next(batches, None)
            if number < start:
                continue
            length = torch.tensor([len(batch["labels"]) if batch else 0], device=self.accelerator.device)
            self.lengths = self.accelerator.gather(length).tolist()
            if not any(self.lengths) and number % self.multiple == 0:
                return
            template = batch or template or self.collate_fn([self.dataset.first()])
            batch = batch or {name: values[:0] for name, values in template.items()}
            yield pad(batch, max(self.lengths) if self.equal_batches else 1)

    def gather(self, values: Any) -> Any:
        """Tensors of the current batch, or nested ones, from all processes, without padding."""

        def drop_padding(gathered: torch.Tensor) -> torch.Tensor:
            parts = gathered.chunk(len(self.lengths))
            return torch.cat([part[:length] for part, length in zip(parts, self.lengths)])

        return recursively_apply(drop_padding, self.accelerator.gather(values))


def pad(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Extends a batch to `length` images by images of zeros without a label."""
    missing = length - len(batch["labels"])
    if missing <= 0:
        return batch
    padded = {}
    for name, values in batch.items():
        shape = (missing, *values.shape[1:])
        padded[name] = torch.cat([values, values.new_full(shape, -100 if name == "labels" else 0)])
    return padded


class StreamPosition(TrainerCallback, ExportableState):
    """The position of a training run in its stream. Checkpoints record it, and logs show it as the epoch."""

    loader: StreamLoader | None = None

    def state(self) -> dict[str, Any]:
        names = ("epoch", "step", "steps_per_epoch") if self.loader else ()
        return {"args": {}, "attributes": {name: getattr(self.loader, name) for name in names}}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs) -> None:
        for name, value in state.stateful_callbacks[type(self).__name__]["attributes"].items():
            setattr(self.loader, name, value)
        self.loader.is_finished = state.global_step >= state.max_steps

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs) -> None:
        """The Trainer would take all steps for one epoch."""
        state.epoch = self.loader.epoch + self.loader.step / (self.loader.steps_per_epoch or float("inf"))

    on_epoch_end = on_step_end


class StreamTrainer(Trainer):
    """
    A [`~transformers.Trainer`] whose datasets may be [`ImageStream`]s, of which each process reads a part. By default,
    Transformers reads a stream in the first process only.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.position: StreamPosition | None = None
        if isinstance(self.train_dataset, ImageStream):
            self.args.ignore_data_skip = True  # a resumed loader knows where it stands
            self.position = StreamPosition()
            self.add_callback(self.position)

    def stream_loader(self, dataset: ImageStream, batch_size: int, **options) -> StreamLoader:
        workers = self.args.dataloader_num_workers
        return StreamLoader(
            dataset,
            self.accelerator,
            batch_size,
            self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            **options,
        )

    def get_train_dataloader(self) -> Any:
        if not isinstance(self.train_dataset, ImageStream):
            return super().get_train_dataloader()
        self.position.loader = self.stream_loader(
            self.train_dataset,
            self._train_batch_size,
            multiple=self.args.gradient_accumulation_steps,
            drop_last=self.args.dataloader_drop_last,
            persistent_workers=self.args.dataloader_persistent_workers,
        )
        return self.position.loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(dataset, ImageStream):
            return super().get_eval_dataloader(eval_dataset)
        return self.stream_loader(dataset, self.args.eval_batch_size, equal_batches=True)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        if not isinstance(test_dataset, ImageStream):
            return super().get_test_dataloader(test_dataset)
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(self, dataloader: Any, *args, **kwargs) -> EvalLoopOutput:
        is_stream = isinstance(dataloader, StreamLoader)
        if is_stream:
            self.gather_function = dataloader.gather  # until the end of this evaluation
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        return output._replace(num_samples=len(output.label_ids)) if is_stream else output
