"""Fine-tuning from the command line: what comes out, and what can be asked for."""

import json
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from examples_in_process import CLASSES, EXAMPLES, TINY_TRAINING, history, write_zoo
from hub_server import HubServer
from image_folders import write_pairs
from peft import PeftModel
from safetensors.torch import load_file
from timm_reference import perturb
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, TrainingArguments, pipeline

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.remote_code import AUTO_MAP
from crossvit.training.data import ImageSource, LabelledImages


# Later releases of transformers have another name for it
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


@pytest.fixture
def checkpoint(small_config, tmp_path):
    """Weights for five other classes."""
    perturb(CrossViTForImageClassification(small_config)).save_pretrained(tmp_path / "checkpoint")
    processor = CrossViTImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 36, "width": 36}, image_mean=[0.5, 0.4, 0.3]
    )
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def same_weights(folder, other) -> bool:
    weights, others = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_what_comes_out(finetune, zoo, tmp_path):
    folder = finetune("--report_to", "tensorboard")
    results = json.loads((folder / "validation_results.json").read_text())
    assert results["eval_accuracy"] >= 0.75 and results["eval_f1"] >= 0.7
    assert list(folder.glob("runs/*/events.*"))
    assert (folder / "validation_confusion.png").is_file()

    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == dict(enumerate(CLASSES)) and config.label2id["cow"] == 2
    # The pipeline, its own preprocessing included, agrees with the evaluation
    files = sorted(map(str, zoo.glob("validation/*/*.png")))
    answers = pipeline("image-classification", model=str(folder))(files, top_k=1)
    right = sum(answer[0]["label"] in file for answer, file in zip(answers, files))
    assert right == round(9 * results["eval_accuracy"])

    best = max(history(folder, "eval_accuracy"))
    assert results["eval_accuracy"] == best and len(list(folder.glob("checkpoint-*"))) <= 2
    card = (folder / "README.md").read_text()
    assert "trained from scratch on the zoo dataset" in card
    assert f"Accuracy: {round(best, 4)}" in card
    assert str(tmp_path) not in card


def test_a_checkpoint_keeps_its_weights_and_gets_heads_for_the_classes(finetune, checkpoint):
    folder = finetune("--learning_rate", "0", "--weight_decay", "0", start=("--model", checkpoint))
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
    folder = finetune("--num_train_epochs", "1", start=("--model", checkpoint))
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageClassification"].startswith("modeling_crossvit.")
    assert (folder / "modeling_crossvit.py").is_file() and (folder / "configuration_crossvit.py").is_file()


def test_a_checkpoint_of_timm(finetune, tmp_path):
    model = timm.create_model("crossvit_9_240", num_classes=5, depth=((1, 1, 0),))
    timm.models.save_for_hf(model, tmp_path / "timm", model_args={"depth": ((1, 1, 0),)})
    options = ["--learning_rate", "0", "--weight_decay", "0", "--num_train_epochs", "0.1"]
    folder = finetune(*options, start=("--model", tmp_path / "timm"))
    assert torch.equal(load_file(folder / "model.safetensors")["crossvit.embeddings.0.cls_token"], model.cls_token_0)


def test_bfloat16_needs_no_other_option_without_a_gpu(example, zoo, checkpoint, tmp_path):
    options = ["--data", zoo, "--output_dir", tmp_path / "tuned", "--bf16", "--max_steps", "1"]
    status, _, errors = example("finetune", "--model", checkpoint, *options)
    assert status == 0, errors


def test_heads_that_know_the_classes_are_kept(finetune, checkpoint):
    first = finetune("--num_train_epochs", "1", start=("--model", checkpoint))
    second = finetune("--learning_rate", "0", "--weight_decay", "0", output="second", start=("--model", first))
    assert same_weights(first, second)


@pytest.mark.parametrize(
    "text, sizes, crop", [("48", ((48, 48), (40, 40)), (48, 48)), ("48x24", ((48, 24), (40, 24)), (48, 24))]
)
def test_other_image_sizes(finetune, checkpoint, text, sizes, crop):
    folder = finetune("--image_size", text, "--num_train_epochs", "1", start=("--model", checkpoint))
    assert AutoConfig.from_pretrained(folder).image_sizes == sizes
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values = processor(PIL.Image.new("RGB", (70, 50)), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape[2:] == crop
    AutoModelForImageClassification.from_pretrained(folder)(pixel_values)


@pytest.fixture
def pairs(tmp_path, small_config):
    """Pairs of images whose classes show only in both of them together, beside a configuration."""
    small_config.initializer_range = 0.15  # such narrow layers hardly begin to learn with 0.02
    small_config.save_pretrained(tmp_path / "config")
    return write_pairs(tmp_path / "pairs", {"train": 64, "validation": 20})


def test_an_image_for_each_branch(finetune, example, pairs, tmp_path):
    results = {}
    for columns in (["photo", "scan"], ["photo"]):
        folder = finetune("--image_columns", *columns, "--color_jitter", "0.05", data=pairs, output=columns[-1])
        results[columns[-1]] = json.loads((folder / "validation_results.json").read_text())
    # Half of the pairs of each kind of photo have either class. 1.0 and 0.5 were measured
    assert results["scan"]["eval_accuracy"] >= 0.9 and results["photo"]["eval_accuracy"] <= 0.7

    arguments = ["--model", tmp_path / "scan", "--data", pairs, "--cpu", "--output", tmp_path / "results.json"]
    status, _, errors = example("evaluate_checkpoint", *arguments, "--image_columns", "photo", "scan")
    assert status == 0, errors
    measured = json.loads((tmp_path / "results.json").read_text())
    assert measured["top1"] == results["scan"]["eval_accuracy"] and measured["f1"] == results["scan"]["eval_f1"]
    status, _, errors = example("evaluate_checkpoint", *arguments, "--image_columns", "photo", "scan", "photo")
    assert status == 1 and "one for each of its 2 branches, got 3" in errors.splitlines()[-1]


def test_an_image_for_each_branch_from_a_stream(finetune, pairs, tmp_path):
    images = LabelledImages.load(ImageSource(str(pairs), image_columns=["photo", "scan"]))
    datasets.DatasetDict(images.splits).save_to_disk(tmp_path / "saved")
    options = ["--image_columns", "photo", "scan", "--streaming", "--max_steps", "48", "--save_steps", "48"]
    folder = finetune(*options, data=tmp_path / "saved")
    assert json.loads((folder / "validation_results.json").read_text())["eval_accuracy"] >= 0.9


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image_columns", "photo", "scan", "photo"], "--image_columns photo scan photo: the model takes one image"),
        (["--image_columns", "photo", "scan", "--auto_augment", "rand-m9"], "`auto_augment` rand-m9 moves each image"),
        (["--image_columns", "photo", "depth"], "has no column depth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_columns_of_images_are_named(example, pairs, tmp_path, options, message):
    arguments = ["--config", tmp_path / "config", "--data", pairs, "--output_dir", tmp_path / "out", *TINY_TRAINING]
    status, _, errors = example("finetune", *arguments, *options)
    assert status == 1 and message in errors.splitlines()[-1] and "Traceback" not in errors


def test_many_labels(finetune, tmp_path):
    folder = tmp_path / "many"
    generator = np.random.default_rng(0)
    for split, number in (("train", 48), ("validation", 11)):
        (folder / split).mkdir(parents=True)
        rows = []
        for name in map(str, range(number)):
            present = generator.integers(0, 2, 3)
            pixels = generator.integers(0, 120, (36, 36, 3)) + 130 * present
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f"{name}.png")
            labels = [CLASSES[channel] for channel in np.flatnonzero(present)]
            rows.append(json.dumps({"file_name": f"{name}.png", "labels": labels}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))
    output = finetune("--num_train_epochs", "10", data=folder)
    config = AutoConfig.from_pretrained(output)
    assert config.problem_type == "multi_label_classification" and config.id2label == dict(enumerate(CLASSES))
    results = json.loads((output / "validation_results.json").read_text())
    assert results["eval_f1"] >= 0.85 and results["eval_f1"] == max(history(output, "eval_f1"))
    assert "eval_label_accuracy" in results and not (output / "validation_confusion.png").exists()


def test_lora_trains_adapters_and_heads_and_leaves_one_model(finetune, checkpoint, tmp_path):
    output = finetune("--lora_rank", "4", "--learning_rate", "2e-2", start=("--model", checkpoint))
    assert json.loads((output / "validation_results.json").read_text())["eval_accuracy"] >= 0.75
    merged = AutoModelForImageClassification.from_pretrained(output).eval()
    weights, pretrained = merged.state_dict(), load_file(checkpoint / "model.safetensors")
    changed = {name for name, weight in pretrained.items() if not torch.equal(weights[name], weight)}
    assert any("qkv" in name for name in changed) and any("heads.0" in name for name in changed)
    assert not any("layernorm" in name or "embeddings" in name for name in changed)

    # The adapter, with its heads, on the model that it was trained on
    base = CrossViTForImageClassification.from_pretrained(checkpoint, num_labels=3, ignore_mismatched_sizes=True)
    adapted = PeftModel.from_pretrained(base, output / "adapter").eval()
    pixel_values = torch.randn(2, 3, 36, 36)
    with torch.no_grad():  # 1e-6 was measured: merging rounds
        torch.testing.assert_close(adapted(pixel_values).logits, merged(pixel_values).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        ["--bf16"],
        [f"--{CHECKPOINTING}"],
        ["--gradient_accumulation_steps", "3", "--per_device_train_batch_size", "4"],
        ["--torch_compile", "--torch_compile_backend", "aot_eager"],
        ["--average_decay", "0.9", "--num_train_epochs", "10"],
        "--mixup_alpha 0.2 --cutmix_alpha 0.2 --label_smoothing_factor 0.1 --num_train_epochs 10".split(),
        ["--dataloader_num_workers", "2"],
        ["--streaming", "--max_steps", "18"],
    ],
    ids=lambda options: options[0].strip("-"),
)
def test_options_learn(finetune, options):
    folder = finetune(*options)
    assert json.loads((folder / "validation_results.json").read_text())["eval_accuracy"] >= 0.75
    model = CrossViTForImageClassification.from_pretrained(folder)
    assert not any("_orig_mod" in name for name in load_file(folder / "model.safetensors")) and model.num_labels == 3


def test_validation_images_are_held_out_where_there_are_none_and_test_images_are_kept_for_the_end(finetune, tmp_path):
    data = write_zoo(tmp_path / "wild", splits=("train", "test"))
    folder = finetune("--validation_fraction", "0.25", data=data)
    for split, images in (("validation", 6), ("test", 24)):
        results = json.loads((folder / f"{split}_results.json").read_text())
        rate = results[f"{'eval' if split == 'validation' else split}_accuracy"] * images
        assert rate == pytest.approx(round(rate)) and (folder / f"{split}_confusion.png").is_file()


def test_push_to_the_hub(finetune, zoo, tmp_path, small_config):
    small_config.save_pretrained(tmp_path / "config")
    with HubServer() as hub:
        process = subprocess.run(
            [sys.executable, EXAMPLES / "finetune.py", "--config", tmp_path / "config", "--data", zoo, "--output_dir",
             tmp_path / "pushed", "--use_cpu", "--num_train_epochs", "1", "--push_to_hub", "--hub_model_id",
             "tester/zoo", "--report_to", "none"],
            env={**os.environ, **hub.environment}, capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        files = hub.repositories["tester/zoo"].files
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= files.keys()
    assert not any(name.startswith(("checkpoint-", "_")) for name in files)
    card = files["README.md"].decode()
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "missing"], "missing: no data set in such a folder or on the Hub"),
        (["--data", ""], "give --data"),
        (["--config", "missing"], "missing: no configuration of a CrossViT"),
        (["--model", "missing"], "give --model, a CrossViT to fine-tune, or --config"),
        (["--image_size", "12 x 12"], "--image_size 12 x 12: give pixels as 224 or"),
        (["--drop_path_rate", "2"], "`drop_path_rate` must be at least 0 and below 1, got 2.0"),
        (["--lora_rank", "-1"], "--lora_rank -1: must be 0 or more"),
        (["--average_decay", "2"], "between 0 and 1, got 2.0"),
        (["--crop_scale", "2", "1"], "`crop_scale` must be two shares of an image"),
        (["--confg", "x"], "unrecognized arguments: --confg"),
        (["--streaming"], "--streaming: a stream has no known end"),
        (["--save_strategy", "steps"], "--load_best_model_at_end requires the save and eval strategy to match"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_named_before_the_training(example, zoo, small_config, tmp_path, options, message):
    small_config.save_pretrained(tmp_path / "config")
    arguments = ["--config", tmp_path / "config", "--data", zoo, "--output_dir", tmp_path / "out", *TINY_TRAINING]
    status, _, errors = example("finetune", *arguments, *options)
    assert status in (1, 2) and message in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_output_among_the_images_is_refused(example, zoo, small_config, tmp_path):
    small_config.save_pretrained(tmp_path / "config")
    arguments = ["--config", tmp_path / "config", "--data", zoo, "--output_dir", zoo / "out", *TINY_TRAINING]
    status, _, errors = example("finetune", *arguments)
    assert status == 1 and "lies in --data" in errors and not (zoo / "out").exists()


def test_what_was_found_is_printed_and_where_a_run_goes_on(example, zoo, small_config, tmp_path):
    small_config.save_pretrained(tmp_path / "config")
    arguments = ["--config", tmp_path / "config", "--data", zoo, "--output_dir", tmp_path / "out", *TINY_TRAINING]
    status, output, _ = example("finetune", *arguments, "--num_train_epochs", "1")
    assert status == 0 and "Images: 24 train, 9 validation; 3 classes: ant, bee, cow" in output
    assert "Going on" not in output
    status, output, _ = example("finetune", *arguments, "--num_train_epochs", "2")
    assert status == 0 and f"Going on from {tmp_path / 'out' / 'checkpoint-3'}" in output
    # A folder of images that was moved is the same
    (tmp_path / "zoo").rename(tmp_path / "moved")
    arguments[3] = tmp_path / "moved"
    status, output, _ = example("finetune", *arguments, "--num_train_epochs", "3")
    assert status == 0 and "Going on from" in output


@pytest.mark.parametrize("change", ["another image", "another label", "another split"])
def test_run_does_not_go_on_with_other_images(example, zoo, small_config, tmp_path, change):
    small_config.save_pretrained(tmp_path / "config")
    arguments = ["--config", tmp_path / "config", "--data", zoo, "--output_dir", tmp_path / "out", *TINY_TRAINING]
    assert example("finetune", *arguments, "--num_train_epochs", "1")[0] == 0
    image = sorted((zoo / "validation" / "ant").iterdir())[0]
    if change == "another image":
        shutil.copy(image, image.with_name("new.png"))
    elif change == "another label":
        image.rename(zoo / "validation" / "bee" / "new.png")
    else:
        image.rename(zoo / "train" / "ant" / "new.png")
    status, _, errors = example("finetune", *arguments, "--num_train_epochs", "2")
    assert status == 1 and "was trained on other images, labels or splits" in errors.splitlines()[-1]
    assert not (tmp_path / "out" / "checkpoint-6").exists()
