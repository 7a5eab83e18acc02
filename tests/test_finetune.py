"""Fine-tuning from the command line: what comes out, and what can be asked for."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from examples_in_process import CLASSES, EXAMPLES, TINY_TRAINING, history, write_zoo
from filelock import FileLock
from hub_server import HubServer
from peft import PeftModel
from reference_files import save_timm_folder, small_timm
from safetensors.torch import load_file
from timm_reference import perturb
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor


# Later releases of transformers have another name for it
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in transformers.TrainingArguments.__dataclass_fields__:
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
    assert results["eval_accuracy"] >= 0.75 and results["eval_top5_accuracy"] == 1 and results["eval_f1"] >= 0.7
    assert list(folder.glob("runs/*/events.*"))
    with PIL.Image.open(folder / "validation_confusion.png") as picture:
        assert min(picture.size) > 300 and np.unique(np.asarray(picture.convert("L"))).size > 50

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
    assert "trained from scratch" in card and f"Accuracy: {best}" in card
    assert str(tmp_path) not in card


def test_a_checkpoint_keeps_its_weights_and_gets_heads_for_the_classes(finetune, checkpoint):
    folder = finetune("--learning_rate", "0", "--weight_decay", "0", start=("--model", checkpoint))
    weights, pretrained = load_file(folder / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert weights["classifier.heads.0.weight"].shape == (3, 24)
    for name, weight in weights.items():
        assert torch.equal(weight, pretrained[name]) != name.startswith("classifier"), name
    assert list(AutoImageProcessor.from_pretrained(folder).image_mean) == [0.5, 0.4, 0.3]
    assert "weights on the author's machine" in (folder / "README.md").read_text()


def test_a_converted_checkpoint_keeps_its_code(finetune, convert, tmp_path):
    checkpoint = convert(save_timm_folder(small_timm(), tmp_path / "timm"))
    folder = finetune("--num_train_epochs", "1", start=("--model", checkpoint))
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageClassification"].startswith("modeling_crossvit.")
    assert (folder / "modeling_crossvit.py").is_file() and (folder / "configuration_crossvit.py").is_file()
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    assert not (folder / "conversion.json").exists()  # these are no longer the published weights


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
        [
            "--mixup_alpha",
            "0.2",
            "--cutmix_alpha",
            "0.2",
            "--label_smoothing_factor",
            "0.1",
            "--num_train_epochs",
            "10",
        ],
        ["--dataloader_num_workers", "2"],
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


def test_the_same_images_from_disk_and_as_a_stream_train_the_same_model(finetune, zoo, tmp_path):
    saved = datasets.load_dataset("imagefolder", data_dir=str(zoo))
    saved.save_to_disk(tmp_path / "saved")
    options = ["--logging_steps", "1", "--mixup_alpha", "0.8", "--save_steps", "9", "--save_strategy", "steps"]
    options += ["--eval_strategy", "steps"]
    disk = finetune("--num_train_epochs", "3", *options, output="disk")
    losses = history(disk, "loss")
    assert len(losses) == 9
    # 24 images are three whole batches: the epochs of a stream begin where those from disk do
    for name, data in (("stream", zoo), ("saved-stream", tmp_path / "saved")):
        stream = finetune("--streaming", "--max_steps", "9", *options, output=name, data=data)
        assert history(stream, "loss") == losses and same_weights(stream, disk)


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
    assert 'model="tester/zoo"' in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "missing"], "missing: no data set in such a folder or on the Hub"),
        (["--data", ""], "give --data"),
        (["--config", "missing"], "missing: no configuration of a CrossViT"),
        (["--model", "missing"], "give --model, a CrossViT to fine-tune, or --config"),
        (["--image_size", "12 x 12"], "--image_size 12 x 12: give pixels as 224 or"),
        (["--image_size", "100000000"], "--image_size 100000000: "),
        (["--drop_path_rate", "2"], "`drop_path_rate` must be at least 0 and below 1, got 2.0"),
        (["--lora_rank", "-1"], "--lora_rank -1: must be 0 or more"),
        (["--average_decay", "2"], "between 0 and 1, got 2.0"),
        (["--crop_scale", "2", "1"], "`crop_scale` must be two parts of an image"),
        (["--confg", "x"], "unrecognized arguments: --confg"),
        (["--metric_for_best_model", "f2"], "--metric_for_best_model f2: none of accuracy, top5_accuracy, f1, loss"),
        (["--label_smoothing_factor", "2"], "--label_smoothing_factor 2.0: must be"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0: must be above 0"),
        (["--streaming"], "--streaming: a stream has no known end"),
        (
            ["--streaming", "--max_steps", "3", "--dataloader_num_workers", "2"],
            "--dataloader_num_workers 2: a stream of 1",
        ),
        (["--report_to", "nothing_of_the_kind"], "nothing_of_the_kind"),
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
    # It does not stand in the way of the right command
    status, _, errors = example("finetune", *arguments, "--num_train_epochs", "0.1", "--check_images", "false")
    assert status == 0, errors


def test_a_run_has_its_folder_to_itself(example, finetune, zoo, tmp_path):
    folder = finetune("--num_train_epochs", "1")
    arguments = ["--config", tmp_path / "config", "--data", zoo, "--output_dir", folder, *TINY_TRAINING]
    status, _, errors = example("finetune", *arguments, "--num_train_epochs", "2")
    assert status == 1 and "num_train_epochs was 1.0 and is 2.0" in errors and "Traceback" not in errors
    for folder in (folder, tmp_path / "begun"):
        arguments[5] = folder
        folder.mkdir(exist_ok=True)
        before = sorted(folder.iterdir())
        with FileLock(folder / "_lock"):
            status, _, errors = example("finetune", *arguments, "--num_train_epochs", "1")
        assert status == 1 and f"--output_dir {folder}: another command is writing there" in errors
        assert {*folder.iterdir()} == {*before, folder / "_lock"}
    arguments[5] = zoo / "out"
    status, _, errors = example("finetune", *arguments)
    assert status == 1 and "lies in --data" in errors and not (zoo / "out").exists()


def test_a_finished_run_that_was_moved_keeps_its_best_model(finetune, tmp_path):
    folder = finetune()
    states = (json.loads(file.read_text()) for file in folder.glob("checkpoint-*/trainer_state.json"))
    state = max(states, key=lambda state: state["global_step"])
    assert state["best_global_step"] < state["global_step"]
    weights = load_file(folder / "model.safetensors")
    folder.rename(tmp_path / "moved")
    moved = load_file(finetune(output="moved") / "model.safetensors")
    assert all(torch.equal(moved[name], weight) for name, weight in weights.items())


def test_a_run_that_begins_anew_reads_validation_images_of_a_stream_again(example, small_config, zoo, tmp_path):
    small_config.save_pretrained(tmp_path / "config")
    arguments = ["--config", tmp_path / "config", "--data", zoo, "--output_dir", tmp_path / "out", *TINY_TRAINING]
    arguments += ["--streaming", "--max_steps", "2"]
    assert example("finetune", *arguments, "--metric_for_best_model", "typo")[0] == 1
    (zoo / "validation" / "ant" / "2.png").unlink()
    status, _, errors = example("finetune", *arguments)
    assert status == 0, errors
    (copy,) = (tmp_path / "out" / "_images").rglob("*.arrow")
    assert len(datasets.Dataset.from_file(str(copy))) == 8


def test_a_damaged_image_that_was_not_checked_is_named_when_it_comes(example, small_config, zoo, tmp_path):
    small_config.save_pretrained(tmp_path / "config")
    (zoo / "train" / "bee" / "3.png").write_text("no image")
    arguments = ["--config", tmp_path / "config", "--data", zoo, "--output_dir", tmp_path / "out", *TINY_TRAINING]
    for options in ([], ["--check_images", "false"], ["--check_images", "false", "--dataloader_num_workers", "1"]):
        status, _, errors = example("finetune", *arguments, *options)
        last = errors.splitlines()[-1]
        assert (
            status == 1 and f"{zoo / 'train' / 'bee' / '3.png'}: not an image" in last and last.startswith("finetune")
        )
