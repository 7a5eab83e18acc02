"""Two processes, as `torchrun` starts them, give what one gives with twice the batch."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from examples_in_process import EXAMPLES, history, results
from image_folders import CLASSES
from safetensors.torch import load_file

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor


pytestmark = pytest.mark.slow
# Plain gradient descent shows rounding as it is; AdamW divides by it where gradients are small. No augmentation, for
# which two processes draw other random numbers than one
OPTIONS = "--num_train_epochs 3 --optim sgd --learning_rate 0.1 --logging_steps 1".split()
OPTIONS += "--crop_scale 1 1 --horizontal_flip 0 --per_device_eval_batch_size 2 --save_total_limit 9".split()
OPTIONS += ["--load_best_model_at_end", "false"]
STREAM = ["--streaming", "--max_steps", "11", "--per_device_train_batch_size", "4"]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def torchrun(*command: object, **environment: str) -> None:
    """Runs a command in two processes."""
    wait_for(start_agent("--standalone", "--nproc_per_node", "2", *command, **environment))


def start_agent(*arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_machines(*commands: list[object]) -> list[subprocess.Popen]:
    """Starts a command on each machine, all of which are this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", len(commands), "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port]
    return [start_agent(*options, "--node_rank", rank, *command) for rank, command in enumerate(commands)]


def wait_for(agent: subprocess.Popen) -> None:
    output, _ = agent.communicate()
    # gloo's threads now and then abort a process that has done everything and is about to end
    assert agent.returncode == 0 or "terminate called without an active exception" in output, output


def recorded(folder: Path, *command: object) -> list[dict]:
    """What each of two processes that run a command trains on."""
    folder.mkdir()
    torchrun(Path(__file__).parent / "record_inputs.py", folder, *command)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def contents(inputs: torch.Tensor) -> Counter:
    return Counter(image.numpy().tobytes() for image in inputs)


@pytest.fixture
def shards(zoo, tmp_path) -> Path:
    """The zoo as Parquet files: the images to train with in three of unequal length, those for validation in two."""
    splits = datasets.load_dataset("imagefolder", data_dir=str(zoo))
    for split, lengths in (("train", (5, 12, 7)), ("validation", (2, 7))):
        rows, start = splits[split].shuffle(seed=0), 0
        for number, length in enumerate(lengths):
            file = tmp_path / "shards" / f"{split}-{number:05}-of-{len(lengths):05}.parquet"
            file.parent.mkdir(exist_ok=True)
            rows.select(range(start, start + length)).to_parquet(file)
            start += length
    return tmp_path / "shards"


@pytest.mark.parametrize("workers", [[], ["--dataloader_num_workers", "2"]], ids=["default", "workers"])
def test_every_process_and_worker_draws_its_own_augmentation(small_config, zoo, tmp_path, workers):
    """By the recipe, which draws images several times. The weights are the same at the beginning."""
    small_config.save_pretrained(tmp_path / "config")
    command = [EXAMPLES / "pretrain.py", "--config", tmp_path / "config", "--data", zoo, "--disable_tqdm", "true"]
    command += ["--total_batch_size", "8", "--per_device_train_batch_size", "4", "--num_train_epochs", "2", *workers]
    names = ("one", "two") if workers else ("one",)
    runs = [recorded(tmp_path / name, *command, "--output_dir", tmp_path / f"{name}-out") for name in names]
    inputs = [process["inputs"] for process in runs[0]]
    assert max(contents(torch.cat(inputs)).values()) == 1 and sum(map(len, inputs)) == 48
    torch.testing.assert_close(*(process["initial_weights"] for process in runs[0]), atol=0, rtol=0)
    for run in runs:  # reproducibly
        torch.testing.assert_close([process["inputs"] for process in run], inputs, atol=0, rtol=0)


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_two_processes_train_on_a_stream_and_resume(finetune_options, shards, zoo, tmp_path, strategy):
    """Of three files, for two epochs and a half, with workers that persist."""
    output = tmp_path / "out"
    options = [*OPTIONS, *STREAM, "--dataloader_num_workers", "2", "--eval_strategy", strategy]
    options += ["--save_strategy", strategy, "--eval_steps", "3", "--save_steps", "3"]
    command = [EXAMPLES / "finetune.py", *finetune_options(*options, output="out", data=shards)]
    first, second = recorded(tmp_path / "recorded", *command)
    times = contents(torch.cat([first["inputs"], second["inputs"]]))
    assert len(times) == 24 and set(times.values()) == {2, 3}

    # The metrics of two processes are those of all images
    model = CrossViTForImageClassification.from_pretrained(output).eval()
    processor = CrossViTImageProcessor.from_pretrained(output)
    files = sorted((zoo / "validation").glob("*/*.png"))
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    with torch.no_grad():
        logits = model(**processor([PIL.Image.open(file) for file in files], return_tensors="pt")).logits
    found = results(output)
    assert found["eval_accuracy"] == pytest.approx((logits.argmax(dim=1) == labels).float().mean().item())
    # 1e-8 was measured
    assert found["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-6)

    if strategy == "epoch":
        return
    # As if it had been killed after the last but one checkpoint, in the middle of an epoch
    (output / "model.safetensors").rename(tmp_path / "model.safetensors")
    shutil.rmtree(output / "checkpoint-11")
    torchrun(*command)
    assert_same_weights(output, tmp_path, atol=0)


@pytest.mark.parametrize("source", ["zoo", "shards"])
def test_two_machines_train_as_one_with_two_processes(finetune_options, request, tmp_path, source):
    """Bit by bit, in and out of a stream."""
    options = [*OPTIONS, *(STREAM if source == "shards" else ["--num_train_epochs", "2"])]
    data = request.getfixturevalue(source)
    torchrun(EXAMPLES / "finetune.py", *finetune_options(*options, output="one", data=data))
    command = [EXAMPLES / "finetune.py", *finetune_options(*options, output="two", data=data)]
    for agent in start_machines(command, command):
        wait_for(agent)
    assert_same_weights(tmp_path / "one", tmp_path / "two", atol=0)


def test_machines_do_not_resume_from_different_checkpoints(finetune_options, tmp_path):
    """The folder of the output must be one that they share."""
    options = [finetune_options("--num_train_epochs", "1", output=name) for name in ("first", "second")]
    for run in (1, 2):
        machines = start_machines(*([EXAMPLES / "finetune.py", *machine_options] for machine_options in options))
        outputs = [machine.communicate()[0] for machine in machines]
        assert all(machine.returncode == run - 1 for machine in machines)
    assert all("find the same checkpoint to resume from, but checkpoint-2, None" in output for output in outputs)


def assert_same_weights(folder: Path, other: Path, atol: float) -> None:
    weights, others = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=atol, rtol=0)


def save_gradients(rank: int, model: torch.nn.Module, pixel_values: torch.Tensor, folder: Path) -> None:
    """Of the loss of one half of a batch in each of two processes."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(model)
    model(pixel_values.chunk(2)[rank], labels=torch.arange(4).chunk(2)[rank]).loss.backward()
    torch.save([parameter.grad for parameter in model.parameters()], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_with_an_image_for_each_branch(small_config, tmp_path):
    model, pixel_values = CrossViTForImageClassification(small_config), torch.randn(4, 2, 3, 36, 36)
    torch.multiprocessing.spawn(save_gradients, (model, pixel_values, tmp_path), nprocs=2)
    loss = model(pixel_values, labels=torch.arange(4)).loss
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for rank in (0, 1):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(gradients, list(expected), atol=1e-6, rtol=0)  # 2e-7 was measured


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(finetune, finetune_options, tmp_path, kind):
    one, two = finetune(*OPTIONS, output="one"), tmp_path / "two"
    options = finetune_options(*OPTIONS, "--per_device_train_batch_size", "4", output="two")
    command = [EXAMPLES / "finetune.py", *options]
    environment = {}
    if kind == "fsdp":
        command, environment = [Path(__file__).parent / "fsdp_on_cpu.py", *command], FSDP
    torchrun(*command, **environment)
    # Losses differed by 2.4e-7, weights by 1.6e-8 when this was written
    np.testing.assert_allclose(history(two, "loss"), history(one, "loss"), atol=2e-6, rtol=0)
    assert_same_weights(two, one, atol=2e-7)
    # Of nine images: the last batch of two processes is a short one
    assert history(two, "eval_accuracy") == history(one, "eval_accuracy") and history(one, "eval_accuracy")[0] < 1
    assert history(two, "eval_f1") == history(one, "eval_f1")

    # As if it had been killed in the last epoch
    (two / "model.safetensors").rename(tmp_path / "model.safetensors")
    shutil.rmtree(two / "checkpoint-9")
    if kind == "fsdp":  # whose checkpoints are sharded, unlike the model that is saved in the end
        assert not (two / "checkpoint-6" / "model.safetensors").exists()
    torchrun(*command, **environment)
    assert_same_weights(two, tmp_path, atol=0)


def test_two_processes_repeat_the_images_that_one_process_repeats(example, zoo, small_config, tmp_path):
    """In steps of four batches: each process accumulates two of them, or the only one all four."""
    small_config.save_pretrained(tmp_path / "config")
    options = ["--config", tmp_path / "config", "--data", zoo, *OPTIONS, *"--auto_augment= --random_erasing 0".split()]
    options += "--mixup_alpha 0 --cutmix_alpha 0 --drop_path_rate 0 --warmup_steps 0 --use_cpu".split()
    options += "--total_batch_size 16 --per_device_train_batch_size 4 --learning_rate_batch_size 16".split()
    example("pretrain", *options, "--output_dir", tmp_path / "one")
    torchrun(EXAMPLES / "pretrain.py", *options, "--output_dir", tmp_path / "two")
    losses = history(tmp_path / "one", "loss")
    # 8 of the 24 draws of an epoch are left over. Losses were equal, weights differed by 2.6e-8 when this was written
    assert len(losses) == 3
    np.testing.assert_allclose(history(tmp_path / "two", "loss"), losses, atol=2e-6, rtol=0)
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=2e-7)


def test_two_processes_measure_as_one_does(finetune, example, zoo, tmp_path):
    model = finetune("--num_train_epochs", "2")
    results = []
    for output, options in (("one.json", []), ("two.json", []), ("stream.json", ["--streaming"])):
        command = ["--model", model, "--data", zoo, "--cpu", "--batch_size", "2", *options]
        command += ["--output", tmp_path / output]
        if output == "one.json":
            example("evaluate_checkpoint", *command)
        else:
            torchrun(EXAMPLES / "evaluate_checkpoint.py", *command)
        result = json.loads((tmp_path / output).read_text())
        results.append({name: result[name] for name in ("images", "top1", "top5", "f1")})
    assert results[0] == results[1] == results[2] and results[0]["images"] == 9
