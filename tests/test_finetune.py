"""Fine-tuning from the command line: what comes out, and what can be asked for."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from examples_in_process import EXAMPLES, history, results, save_checkpoint
from image_folders import CLASSES, encoded, write_pairs, write_rows, write_zoo
from peft import PeftModel
from safetensors.torch import load_file
from small_training import CHECKPOINTING
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from crossvit import CrossViTForImageClassification
from crossvit.remote_code import AUTO_MAP


FROZEN = ["--learning_rate", "0", "--weight_decay", "0"]


def same_weights(folder, other) -> bool:
    weights, others = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_what_comes_out(finetune, zoo, tmp_path):
    folder = finetune("--report_to", "tensorboard")
    found = results(folder)
    assert found["eval_accuracy"] >= 0.75 and found["eval_f1"] >= 0.7
    assert list(folder.glob("runs/*/events.*"))
    assert (folder / "validation_confusion.png").is_file()

    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == dict(enumerate(CLASSES)) and config.label2id["cow"] == 2
    # The pipeline, its own preprocessing included, agrees with the evaluation
    files = sorted(map(str, zoo.glob("validation/*/*.png")))
    answers = pipeline("image-classification", model=str(folder))(files, top_k=1)
    right = sum(answer[0]["label"] in file for answer, file in zip(answers, files))
    assert right == round(9 * found["eval_accuracy"])

    best = max(history(folder, "eval_accuracy"))
    assert found["eval_accuracy"] == best and len(list(folder.glob("checkpoint-*"))) <= 2
    card = (folder / "README.md").read_text()
    assert "trained from scratch on the zoo dataset" in card and f"Accuracy: {round(best, 4)}" in card
    assert str(tmp_path) not in card


def test_a_checkpoint_keeps_its_weights_and_gets_heads_for_the_classes(finetune, checkpoint):
    folder = finetune(*FROZEN, "--num_train_epochs", "1", model=checkpoint)
    weights, pretrained = load_file(folder / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert weights["classifier.heads.0.weight"].shape == (3, 24)
    for name, weight in weights.items():
        assert torch.equal(weight, pretrained[name]) != name.startswith("classifier"), name
    assert list(AutoImageProcessor.from_pretrained(folder).image_mean) == [0.5, 0.4, 0.3]
    assert "a fine-tuned version of a local checkpoint" in (folder / "README.md").read_text()


def test_a_checkpoint_that_carries_its_code_keeps_it(finetune, checkpoint):
    model = CrossViTForImageClassification.from_pretrained(checkpoint)
    model.config.auto_map = dict(AUTO_MAP)
    model.save_pretrained(checkpoint)
    folder = finetune("--num_train_epochs", "1", model=checkpoint)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageClassification"].startswith("modeling_crossvit.")
    assert (folder / "modeling_crossvit.py").is_file() and (folder / "configuration_crossvit.py").is_file()


def test_a_checkpoint_of_timm(finetune, tmp_path):
    model = timm.create_model("crossvit_9_240", num_classes=5, depth=((1, 1, 0),))
    timm.models.save_for_hf(model, tmp_path / "timm", model_args={"depth": ((1, 1, 0),)})
    folder = finetune(*FROZEN, "--num_train_epochs", "0.1", model=tmp_path / "timm")
    assert torch.equal(load_file(folder / "model.safetensors")["crossvit.embeddings.0.cls_token"], model.cls_token_0)


def test_bfloat16_needs_no_other_option_without_a_gpu(finetune, checkpoint):
    finetune("--bf16", "--max_steps", "1", model=checkpoint)


def test_heads_for_the_same_classes_are_kept(finetune, checkpoint):
    first = finetune("--num_train_epochs", "1", model=checkpoint)
    second = finetune(*FROZEN, "--num_train_epochs", "1", output="second", model=first)
    assert same_weights(first, second)


def test_another_image_size(finetune, checkpoint):
    folder = finetune("--image_size", "48x24", "--num_train_epochs", "1", model=checkpoint)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.image_sizes == ((48, 24), (40, 24))
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values = processor(PIL.Image.new("RGB", (70, 50)), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape[2:] == (48, 24) and model(pixel_values).logits.shape == (1, 3)


@pytest.fixture
def pairs(tmp_path, small_config):
    """Pairs of images whose classes show only in both of them together."""
    small_config.initializer_range = 0.15  # such narrow layers hardly begin to learn with 0.02
    return write_pairs(tmp_path / "pairs", {"train": 64, "validation": 20})


def test_an_image_for_each_branch(pairs, finetune, example, failure, tmp_path):
    folder = finetune("--image_columns", "photo", "scan", "--color_jitter", "0.05", data=pairs)
    found = results(folder)
    # Half of the pairs of each kind of photo have either class: 1.0 was measured, 0.5 with the photos only
    assert found["eval_accuracy"] >= 0.9

    arguments = ["--model", folder, "--data", pairs, "--cpu", "--output", tmp_path / "results.json"]
    example("evaluate_checkpoint", *arguments, "--image_columns", "photo", "scan")
    measured = json.loads((tmp_path / "results.json").read_text())
    assert measured["top1"] == found["eval_accuracy"] and measured["f1"] == found["eval_f1"]
    message = failure("evaluate_checkpoint", *arguments, "--image_columns", "photo", "scan", "photo")
    assert "one for each of its 2 branches, got 3" in message


def test_many_labels(finetune, tmp_path):
    generator = np.random.default_rng(0)
    for split, number in (("train", 48), ("validation", 11)):
        files, rows = {}, []
        for file in (f"{number}.png" for number in range(number)):
            present = generator.integers(0, 2, 3)
            pixels = generator.integers(0, 120, (36, 36, 3)) + 130 * present
            files[file] = encoded(PIL.Image.fromarray(pixels.astype(np.uint8)))
            rows.append({"file_name": file, "labels": [CLASSES[channel] for channel in np.flatnonzero(present)]})
        write_rows(tmp_path / "many" / split, files, rows)
    folder = finetune("--num_train_epochs", "10", data=tmp_path / "many")
    config = AutoConfig.from_pretrained(folder)
    assert config.problem_type == "multi_label_classification" and config.id2label == dict(enumerate(CLASSES))
    found = results(folder)
    assert found["eval_f1"] >= 0.85 and found["eval_f1"] == max(history(folder, "eval_f1"))
    assert "eval_label_accuracy" in found and not (folder / "validation_confusion.png").exists()


def test_lora_trains_adapters_and_heads_and_leaves_one_model(finetune, checkpoint):
    folder = finetune("--lora_rank", "4", "--learning_rate", "2e-2", model=checkpoint)
    assert results(folder)["eval_accuracy"] >= 0.75
    merged = AutoModelForImageClassification.from_pretrained(folder).eval()
    weights, pretrained = merged.state_dict(), load_file(checkpoint / "model.safetensors")
    changed = {name for name, weight in pretrained.items() if not torch.equal(weights[name], weight)}
    assert any("qkv" in name for name in changed) and any("heads.0" in name for name in changed)
    assert not any("layernorm" in name or "embeddings" in name for name in changed)

    # The adapter, with its heads, on the model that it was trained on
    base = CrossViTForImageClassification.from_pretrained(checkpoint, num_labels=3, ignore_mismatched_sizes=True)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    pixel_values = torch.randn(2, 3, 36, 36)
    with torch.no_grad():  # 1e-6 was measured: merging rounds
        torch.testing.assert_close(adapted(pixel_values).logits, merged(pixel_values).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        ["--bf16"],
        [f"--{CHECKPOINTING}"],
        ["--gradient_accumulation_steps", "3", "--per_device_train_batch_size", "4"],
        "--mixup_alpha 0.2 --cutmix_alpha 0.2 --label_smoothing_factor 0.1 --num_train_epochs 10".split(),
        ["--dataloader_num_workers", "1"],
        ["--streaming", "--max_steps", "18"],
    ],
    ids=lambda options: options[0].strip("-"),
)
def test_options_learn(finetune, options):
    assert results(finetune(*options))["eval_accuracy"] >= 0.75


def test_layer_decay_lowers_the_learning_rates_of_early_layers(finetune, checkpoint):
    folder = finetune("--layer_decay", "0.5", "--num_train_epochs", "1", model=checkpoint)
    (file,) = folder.glob("checkpoint-*/optimizer.pt")
    rates = {group["initial_lr"] for group in torch.load(file)["param_groups"]}
    # Heads, second stage, first stage, embeddings
    assert rates == {2e-3, 1e-3, 5e-4, 2.5e-4}


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--streaming", "--max_steps", "4"]], ids=["disk", "stream"])
def test_no_workers_are_left(finetune, options):
    """They would delay the exit of a process that uses a GPU."""
    finetune("--num_train_epochs", "1", "--dataloader_num_workers", "2", *options)
    for process in multiprocessing.active_children():
        process.join(60)  # which takes a moment if PyTorch had to end it
    assert multiprocessing.active_children() == []


def test_a_compiled_model_is_saved_under_its_own_names(finetune):
    folder = finetune("--torch_compile", "--torch_compile_backend", "eager", "--num_train_epochs", "1")
    model = CrossViTForImageClassification.from_pretrained(folder)
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


def test_validation_images_are_held_out_where_there_are_none_and_test_images_are_kept_for_the_end(finetune, tmp_path):
    data = write_zoo(tmp_path / "wild", splits=("train", "test"))
    folder = finetune("--validation_fraction", "0.25", "--num_train_epochs", "1", data=data)
    for split, prefix, images in (("validation", "eval", 6), ("test", "test", 24)):
        right = results(folder, split)[f"{prefix}_accuracy"] * images
        assert right == pytest.approx(round(right)) and (folder / f"{split}_confusion.png").is_file()


def test_push_to_the_hub(hub, finetune_options, tmp_path):
    options = finetune_options("--num_train_epochs", "1", "--push_to_hub", "--hub_model_id", "tester/zoo")
    # In a separate process, as the client reads the address of the Hub when it is imported
    process = subprocess.run(
        [sys.executable, EXAMPLES / "finetune.py", *options],
        env={**os.environ, **hub.environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    files = hub.repositories["tester/zoo"].files
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= files.keys()
    assert not any(name.startswith(("checkpoint-", "_")) for name in files)
    assert str(tmp_path) not in files["README.md"].decode()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "missing"], "missing: not a dataset, locally or on the Hub"),
        (["--data", ""], "give --data"),
        (["--config", "missing"], "missing: no configuration of a CrossViT"),
        (["--model", "missing"], "give --model, a CrossViT to fine-tune, or --config"),
        (["--image_size", "12 x 12"], "--image_size 12 x 12: give pixels as 224 or"),
        (["--drop_path_rate", "2"], "`drop_path_rate` must be at least 0 and below 1, got 2.0"),
        (["--lora_rank", "-1"], "--lora_rank -1: must be 0 or more"),
        (["--layer_decay", "2"], "`layer_decay` must be above 0 and at most 1, such as 0.75, got 2.0"),
        (["--confg", "x"], "unrecognized arguments: --confg"),
        (["--streaming"], "--streaming requires --max_steps"),
        (["--image_columns", "image", "image", "image"], "--image_columns image image image: the model takes one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_named_before_the_training(failure, finetune_options, tmp_path, options, message):
    assert message in failure("finetune", *finetune_options(*options))
    assert not (tmp_path / "tuned" / "model.safetensors").exists()


def test_only_rgb_images_are_trained_with(failure, finetune_options, small_config, tmp_path):
    small_config.num_channels = 1
    gray = save_checkpoint(small_config, tmp_path / "gray", image_mean=[0.5], image_std=[0.2], do_convert_rgb=False)
    message = "takes images of 1 channels, but training is only for RGB images"
    assert message in failure("finetune", *finetune_options(model=gray))


def test_an_output_among_the_images_is_refused(failure, finetune_options, zoo):
    assert "lies in --data" in failure("finetune", *finetune_options(output="zoo/out"))
    assert not (zoo / "out").exists()


def test_what_was_found_is_printed_and_where_a_run_goes_on(example, finetune_options, zoo, tmp_path):
    output, _ = example("finetune", *finetune_options("--num_train_epochs", "1"))
    assert "Images: 24 train, 9 validation; 3 classes: ant, bee, cow" in output and "Going on" not in output
    shutil.copytree(tmp_path / "tuned", tmp_path / "first")
    # The end is reached already, and images that were moved are the same
    zoo.rename(tmp_path / "moved")
    output, _ = example("finetune", *finetune_options("--num_train_epochs", "1", data=tmp_path / "moved"))
    assert f"Resuming from {tmp_path / 'tuned' / 'checkpoint-3'}" in output
    assert same_weights(tmp_path / "tuned", tmp_path / "first")


def test_run_does_not_go_on_with_other_images(finetune, finetune_options, failure, zoo):
    folder = finetune("--num_train_epochs", "1")
    (zoo / "validation" / "ant" / "0.png").rename(zoo / "train" / "ant" / "new.png")
    message = failure("finetune", *finetune_options("--num_train_epochs", "2"))
    assert "was trained on other images, labels or splits" in message
    assert not (folder / "checkpoint-6").exists()
