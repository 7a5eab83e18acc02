"""A training shows each image in each epoch, from disk and from a stream, with any number of workers and processes."""

import itertools
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard

from crossvit.training.errors import CommandError
from crossvit.training.sampling import AugmentationSampler, ImageDataset, ImageStream


def make_rows(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": list(range(count))})


def make_stream(
    count: int, shards: int = 1, repeats: int = 1, batch_size: int = 1, buffer_size: int = 100, seed: int = 3
):
    rows = make_rows(count).to_iterable_dataset(num_shards=shards).shuffle(seed, buffer_size=buffer_size)
    return ImageStream(rows, True, repeats, batch_size)


def batches_of(stream, count: int, workers: int = 0, batch_size: int = 4, processes: int = 1, process: int = 0):
    """The first batches of a process, as the Trainer loads them."""
    if processes > 1:
        stream = IterableDatasetShard(stream, batch_size, num_processes=processes, process_index=process)
    loader = torch.utils.data.DataLoader(stream, batch_size, num_workers=workers, collate_fn=list)
    return list(itertools.islice(loader, count))


def draws(batches) -> list[tuple[int, int, int]]:
    return [(row["image"], *row["draw"]) for row in itertools.chain(*batches)]


def sampled(length: int, epoch: int = 0, seed: int = 0, repeats: int = 1, batch_size: int = 4):
    sampler = AugmentationSampler(length, seed, repeats, batch_size)
    sampler.set_epoch(epoch)
    assert len(sampler) == length
    return list(sampler)


def test_every_epoch_of_a_sampler_shows_each_image():
    orders = []
    for epoch, seed in itertools.product(range(3), range(2)):
        drawn = sampled(50, epoch, seed)
        assert sorted(index for index, _, _ in drawn) == list(range(50))
        assert {draw[1:] for draw in drawn} == {(epoch, 0)}
        orders.append(tuple(index for index, _, _ in drawn))
        assert sampled(50, epoch, seed) == drawn
    assert len({*orders, tuple(range(50))}) == 7


def test_samplers_go_on_with_the_next_epoch():
    sampler = AugmentationSampler(20, 0, 1, 4)
    for epoch in (2, 0, 1):
        sampler.set_epoch(epoch)
        assert list(sampler) == sampled(20, epoch)


@pytest.mark.parametrize("length, batch_size, repeats", [(24, 4, 3), (50, 4, 2), (49, 8, 3), (3, 4, 2), (10, 1, 2)])
def test_copies_of_an_image_are_in_batches_that_follow(length, batch_size, repeats):
    drawn = sampled(length, 1, 0, repeats, batch_size)
    assert len(drawn) == length
    batches = [drawn[start : start + batch_size] for start in range(0, length, batch_size)]
    for number, batch in enumerate(batches):
        assert len({index for index, _, _ in batch}) == len(batch)
        first = batches[number - number % repeats]
        assert [index for index, _, _ in batch] == [index for index, _, _ in first][: len(batch)]
        assert {(epoch, repeat) for _, epoch, repeat in batch} == {(1, number % repeats)}
    shown = [index for index, _, _ in itertools.chain(*batches[::repeats])]
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize("repeats", [1, 3])
def test_samplers_and_streams_have_the_same_order(repeats):
    stream = make_stream(24, repeats=repeats, batch_size=4, buffer_size=1000)
    found = draws(batches_of(stream, 18 * repeats))
    for epoch in range(3):
        expected = sampled(24, epoch, 3, repeats)
        assert found[24 * repeats * epoch :][:24] == expected


def test_items_by_index_and_by_draw():
    images = ImageDataset(make_rows(5), repeats=2)
    assert len(images) == 5 and images.repeats == 2
    assert images[3] == {"image": 3, "index": 3}
    assert images[3, 7, 1] == {"image": 3, "draw": (7, 1)}
    loader = torch.utils.data.DataLoader(images, 2, collate_fn=list, sampler=AugmentationSampler(5, 0, 1, 2))
    assert draws(loader) == sampled(5)


@pytest.mark.parametrize("workers, shards", [(0, 1), (0, 4), (1, 3), (2, 2), (2, 5), (3, 4)])
def test_every_epoch_of_a_stream_shows_each_image(workers, shards):
    counts = Counter(draws(batches_of(make_stream(11, shards), 60, workers)))
    for epoch in range(10):
        assert [counts[image, epoch, 0] for image in range(11)] == [1] * 11


def test_epochs_of_a_stream_have_an_order_each():
    found = draws(batches_of(make_stream(20), 20))
    orders = [[image for image, epoch, _ in found if epoch == number] for number in range(4)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    other = draws(batches_of(make_stream(20, seed=4), 5))
    assert found[:20] != other
    assert found == draws(batches_of(make_stream(20), 20))


def test_streams_repeat_images():
    found = draws(batches_of(make_stream(12, repeats=3, batch_size=4), 18))
    once = draws(batches_of(make_stream(12), 6))
    for number in range(18):
        expected = once[4 * (number // 3) :][:4]
        assert found[4 * number :][:4] == [(image, epoch, number % 3) for image, epoch, _ in expected]


@pytest.fixture
def as_worker(monkeypatch):
    """Makes this process the worker of a DataLoader, whose failures take PyTorch five seconds to clear up."""

    def set_worker(worker: int, workers: int) -> None:
        info = SimpleNamespace(num_workers=workers, id=worker, seed=0)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: info)

    yield set_worker
    monkeypatch.undo()


def test_workers_do_not_disturb_each_other(as_worker):
    found = batches_of(make_stream(10, 2), 20, workers=2, batch_size=50)
    for worker in range(2):
        as_worker(worker, 2)
        assert found[worker::2] == batches_of(make_stream(10, 2), 10, batch_size=50)


@pytest.mark.parametrize("training", [True, False])
def test_too_many_workers_are_refused(as_worker, training):
    stream = make_stream(10, 2)
    stream.training = training
    as_worker(0, 3)
    with pytest.raises(CommandError, match=r"2 shards takes at most as many workers.*--dataloader_num_workers 3"):
        next(iter(stream))


@pytest.mark.parametrize("training", [True, False])
def test_empty_streams(training):
    stream = ImageStream(datasets.IterableDataset.from_generator(lambda: iter([])), training)
    if training:
        with pytest.raises(CommandError, match="no images"):
            next(iter(stream))
    else:
        assert list(stream) == []


@pytest.mark.parametrize("process", [None, 0, 1])
@pytest.mark.parametrize("workers, shards, images", [(0, 2, 10), (0, 3, 11), (1, 2, 9), (2, 2, 10), (2, 3, 11)])
def test_resumed_streams_go_on_where_they_were(workers, shards, images, process):
    processes = {} if process is None else {"processes": 2, "process": process}
    expected = batches_of(make_stream(images, shards), 16, workers, **processes)
    for skipped in (0, 1, 3, 13):
        stream = make_stream(images, shards)
        stream.skip(skipped, 8 if processes else 4)
        found = batches_of(stream, 16, workers, **processes)
        assert found[:skipped] == [[None] * 4] * skipped
        assert found[skipped:] == expected[skipped:]


@pytest.mark.parametrize("worker", [0, 1])
def test_resumed_workers_with_shards_of_different_sizes(as_worker, worker):
    as_worker(worker, 2)
    expected = batches_of(make_stream(9, 2), 40)
    stream = make_stream(9, 2)
    stream.skip(41, 4)
    skipped = 21 - worker
    assert batches_of(stream, 40)[skipped:] == expected[skipped:]


@pytest.mark.parametrize("repeats", [1, 3])
def test_skipped_images_are_not_read(repeats):
    stream = make_stream(10, repeats=repeats, batch_size=4)
    expected = draws(batches_of(stream, 40))
    read = []
    stream.examples = stream.examples.map(lambda row: (read.append(row["image"]), row)[1])
    stream.skip(35, 4)
    found = list(itertools.islice(stream, 160))
    assert found[:140] == [None] * 140 and draws([found[140:]]) == expected[140:]
    assert len(read) < 50


@pytest.mark.parametrize("workers, shards", [(0, 1), (0, 3), (1, 2), (2, 3), (3, 3)])
def test_evaluation_shows_each_row_once(workers, shards):
    stream = ImageStream(make_rows(11).to_iterable_dataset(num_shards=shards))
    rows = list(itertools.chain(*batches_of(stream, 100, workers)))
    assert sorted(row["image"] for row in rows) == list(range(11))
    assert len({row["index"] for row in rows}) == 11 and all("draw" not in row for row in rows)
    again = list(itertools.chain(*batches_of(stream, 100, workers)))
    assert again == rows


def test_evaluation_by_processes_tells_what_fills_the_last_batch():
    stream = ImageStream(make_rows(11).to_iterable_dataset())
    rows = [row for process in range(2) for batch in batches_of(stream, 9, 0, 4, 2, process) for row in batch]
    assert len(rows) == 16
    assert {row["index"]: row["image"] for row in rows} == {number: number for number in range(11)}
