"""Every image of a stream comes once in an epoch, whatever the number of processes, workers and files."""

import threading
from collections import Counter

import datasets
import PIL.Image
import PIL.ImageFile
import pytest
import torch
from accelerate.utils import recursively_apply
from common.data_sources import ImageSource
from common.images import DecodedImages
from common.labelled_images import LabelledImages
from common.streams import ImageStream, StreamLoader

from crossvit import CrossViTImageProcessor
from crossvit.training.augmentation import AugmentationArguments, TrainingTransform


class Process:
    """What an `Accelerator` tells a loader of one process of several, which are threads of this one."""

    device = torch.device("cpu")

    def __init__(self, process_index: int, num_processes: int, barrier: threading.Barrier, tensors: list):
        self.process_index, self.num_processes = process_index, num_processes
        self.barrier, self.tensors = barrier, tensors

    def gather(self, values):
        return recursively_apply(self.gather_tensor, values)

    def gather_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors[self.process_index] = tensor
        self.barrier.wait(60)
        gathered = torch.cat(self.tensors)
        self.barrier.wait(60)
        return gathered


def in_processes(number: int, function) -> list:
    """The results of a function in each of several processes."""
    barrier, tensors, results = threading.Barrier(number), [None] * number, [None] * number

    def run(index: int) -> None:
        try:
            results[index] = function(Process(index, number, barrier, tensors))
        except BaseException as error:
            results[index] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    labels = torch.tensor([row["labels"] for row in rows])
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}


def transform(rows: dict[str, list]) -> dict[str, list]:
    return {"pixel_values": [torch.full((1, 2, 2), float(row)) for row in rows["number"]], "labels": rows["number"]}


def stream_of(*files: int) -> datasets.IterableDataset:
    """A stream of files of some lengths, whose rows are the numbers from 0."""
    starts = [sum(files[:index]) for index in range(len(files))]

    def rows_of_files(starts: list[int], lengths: list[int]):
        for start, length in zip(starts, lengths):
            yield from ({"number": start + row} for row in range(length))

    return datasets.IterableDataset.from_generator(
        rows_of_files, gen_kwargs={"starts": starts, "lengths": list(files)},
        features=datasets.Features({"number": datasets.Value("int64")}),
    )  # fmt: skip


def loader_of(stream, process, shuffle: int | None = 8, batch_size: int = 4, **options) -> StreamLoader:
    return StreamLoader(ImageStream(stream, transform, shuffle, seed=1), process, batch_size, collate, **options)


def labels_of(loader) -> list[list[int]]:
    """Of each batch of an epoch, without padding, whose images are those of the labels."""
    epoch = []
    for batch in loader:
        real = batch["labels"] != -100
        assert torch.equal(batch["pixel_values"][:, 0, 0, 0], batch["labels"].float() * real)
        epoch.append(batch["labels"][real].tolist())
    return epoch


def read_parts(stream, processes: int, workers: int, shuffle: int | None = 8, epochs: int = 1) -> list[list]:
    """For each epoch, the images that each process reads, with workers that persist."""
    parts = []
    for index in range(processes):
        part = ImageStream(stream, transform, shuffle, seed=1)
        part.process_index, part.num_processes = index, processes
        loader = torch.utils.data.DataLoader(
            part, 4, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
        )
        parts.append([])
        for epoch in range(epochs):
            part.move_to(epoch)
            parts[-1].append([image for batch in loader for image in batch["labels"].tolist()])
    return list(zip(*parts))


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2)])
@pytest.mark.parametrize("files", [(23,), (9, 5, 14), (3,) * 8], ids=len)
def test_every_image_comes_once_in_an_epoch_and_in_another_order_in_the_next(files, processes, workers):
    epochs = read_parts(stream_of(*files), processes, workers, epochs=2)
    for parts in epochs:
        assert Counter(image for part in parts for image in part) == Counter(range(sum(files)))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("processes, workers", [(3, 0), (2, 2)])
def test_whole_files_are_read_where_there_are_enough(processes, workers):
    """Of seven files with ten images each."""
    (parts,) = read_parts(stream_of(*[10] * 7), processes, workers)
    for part in parts:
        images_per_file = Counter(image // 10 for image in part)
        assert len(images_per_file) >= 2 and set(images_per_file.values()) == {10}


def test_processes_that_have_no_images_left_get_padding():
    """Of two files, one is much longer: the other process gets images without labels for as long."""

    def read(process) -> list[tuple[list[int], list[int]]]:
        loader = loader_of(stream_of(17, 2), process, shuffle=None, multiple=3)
        return [(batch["labels"].tolist(), loader.lengths) for batch in loader]

    first, second = in_processes(2, read)
    assert [labels for labels, _ in first] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [16],
        [-100],
    ]
    assert [labels for labels, _ in second] == [[17, 18]] + [[-100]] * 5
    assert [lengths for _, lengths in first] == [[4, 2], [4, 0], [4, 0], [4, 0], [1, 0], [0, 0]]


def test_gathered_values_are_those_of_the_images():
    """Also of a process that never has an image."""

    def read(process) -> list[list[int]]:
        loader = loader_of(stream_of(5, 2, 0), process, shuffle=None, equal_batches=True)
        return [loader.gather({"labels": batch["labels"]})["labels"].tolist() for batch in loader]

    for gathered in in_processes(3, read):
        assert gathered == [[0, 1, 2, 3, 5, 6], [4]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("given", [1, 3, 7])
def test_an_interrupted_epoch_continues_where_it_stopped(given, workers):
    """With 25 images in batches of 4, the last epoch of both is the second one."""
    transformed = []

    def count(rows):
        transformed.append(rows)
        return transform(rows)

    def read(process) -> tuple[list, list]:
        whole = loader_of(stream_of(13, 12), process, num_workers=workers)
        expected = labels_of(whole) + labels_of(whole)
        interrupted = loader_of(stream_of(13, 12), process, num_workers=workers)
        iterator = iter(interrupted)
        found = [next(iterator)["labels"].tolist() for _ in range(given)]
        resumed = loader_of(stream_of(13, 12), process, num_workers=workers)
        resumed.epoch, resumed.step = interrupted.epoch, interrupted.step
        resumed.dataset.transform = count
        while resumed.epoch < 2:
            found += labels_of(resumed)
        return found, expected

    for found, expected in in_processes(1, read):
        assert found == expected
    if workers == 0:  # rows that are skipped are not transformed
        assert len(transformed) == 50 - sum(map(len, expected[:given]))


def test_an_empty_stream_is_an_error():
    with pytest.raises(ValueError, match="no images, or fewer than a batch"):
        in_processes(1, lambda process: labels_of(loader_of(stream_of(3), process, drop_last=True)))


@pytest.mark.parametrize("processes", [1, 2])
def test_images_are_decoded_once_and_not_encoded(zoo, monkeypatch, processes):
    """Neither to shuffle them, nor for the rows of other processes."""
    decoded, load = [], PIL.ImageFile.ImageFile.load

    def count(image):
        if image.tile:
            decoded.append(image)
        return load(image)

    images = LabelledImages.load(ImageSource(str(zoo), streaming=True))
    transform = DecodedImages(TrainingTransform(AugmentationArguments(), CrossViTImageProcessor()))
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", count)
    monkeypatch.setattr(PIL.Image.Image, "save", None)
    for index in range(processes):
        part = ImageStream(images.splits["train"], transform, shuffle_buffer_size=4)
        part.process_index, part.num_processes = index, processes
        list(part)
    assert len(decoded) == 24
