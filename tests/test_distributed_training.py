"""Two processes, as `torchrun` starts them, give what one gives with twice the batch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from examples_in_process import EXAMPLES, history
from safetensors.torch import load_file

from crossvit import CrossViTForImageClassification


pytestmark = pytest.mark.slow
# Plain gradient descent shows rounding as it is; AdamW divides by it where gradients are small. No augmentation, for
# which two processes draw other random numbers than one
OPTIONS = "--num_train_epochs 3 --optim sgd --learning_rate 0.1 --logging_steps 1".split()
OPTIONS += "--crop_scale 1 1 --horizontal_flip 0 --per_device_eval_batch_size 2 --save_total_limit 9".split()
OPTIONS += ["--load_best_model_at_end", "false"]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def torchrun(*command: object, **environment: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, *map(str, command)]
    process = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    # gloo's threads now and then abort a process that has done everything and is about to end
    output = process.stdout + process.stderr
    assert process.returncode == 0 or "terminate called without an active exception" in output, output


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
