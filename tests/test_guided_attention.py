"""Masks guide the attention of a classifier: the loss, its gradient, the metric and the command."""

import re

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from common.data_sources import ImageSource
from common.labelled_images import LabelledImages
from examples_in_process import EXAMPLES, history, results
from image_folders import encoded, write_rows
from safetensors.torch import load_file
from small_training import CHECKPOINTING, accuracy, arguments
from test_distributed_training import assert_same_weights, torchrun

from crossvit import CrossViTConfig, CrossViTForImageClassification
from crossvit.interpretability.rollout import attention_iou, attention_rollout
from crossvit.training.guided_attention import GuidedAttentionTrainer


COLORS = ["blue", "green", "red"]


def draw_shape(label: int, generator: np.random.Generator, side: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a large square in the color of its class, and small ones in any; and the mask of the large one."""
    pixels = generator.integers(0, 128, (side, side, 3))
    for _ in range(4):
        top, left = generator.integers(0, side - 5, 2)
        pixels[top : top + 5, left : left + 5, generator.integers(3)] += 127
    top, left = generator.integers(0, side * 2 // 3, 2)
    mask = np.zeros((side, side), np.uint8)
    mask[top : top + side // 3, left : left + side // 3] = 255
    pixels[mask > 0, label] += 127
    return pixels.clip(0, 255).astype(np.uint8), mask


def shapes(count: int, seed: int) -> list[dict]:
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        pixels, mask = (torch.tensor(array) / 255 for array in draw_shape(number % 3, generator))
        rows.append({"pixel_values": pixels.movedim(-1, 0) * 4 - 1, "labels": number % 3, "mask": mask})
    return rows


@pytest.fixture
def photos(tmp_path):
    """A folder of photos of the shapes, and of their masks."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 9)):
        files, rows = {}, []
        for number in range(count):
            pixels, mask = draw_shape(number % 3, generator, side=40)
            files[f"{number}.png"] = encoded(PIL.Image.fromarray(pixels))
            files[f"masks/{number}.png"] = encoded(PIL.Image.fromarray(mask))
            names = {"photo_file_name": f"{number}.png", "mask_file_name": f"masks/{number}.png"}
            rows.append({**names, "label": COLORS[number % 3]})
        write_rows(tmp_path / "photos" / split, files, rows)
    return tmp_path / "photos"


def make_trainer(model, folder, train=None, evaluation=None, mask_weight=0.5, **options) -> GuidedAttentionTrainer:
    options |= {"save_strategy": "no", "logging_strategy": "no"}
    args = arguments(folder, remove_unused_columns=False, label_names=["labels"], **options)
    return GuidedAttentionTrainer(
        model, args, mask_weight=mask_weight, train_dataset=train, eval_dataset=evaluation, compute_metrics=accuracy
    )


def collated(rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def overlaps(model, rows) -> torch.Tensor:
    batch = collated(rows)
    outputs = model(batch["pixel_values"], output_attentions=True)
    return attention_iou(attention_rollout(outputs, model.config), batch["mask"], model.config)


@pytest.mark.slow
def test_guided_attention_is_on_the_objects_of_unseen_images(tmp_path):
    found = {}
    for weight in (0.0, 0.5):
        transformers.set_seed(0)
        config = CrossViTConfig(
            image_size=(48, 40), patch_size=(6, 8), embed_dim=(32, 32), num_heads=(2, 2), depth=((1, 2, 0),),
            initializer_range=0.15, num_labels=3, problem_type="single_label_classification",
        )  # fmt: skip
        model, unseen = CrossViTForImageClassification(config), shapes(50, seed=2)
        trainer = make_trainer(
            model, tmp_path, shapes(192, seed=1), unseen, mask_weight=weight, num_train_epochs=10, learning_rate=2e-3,
            per_device_train_batch_size=16, per_device_eval_batch_size=16,
        )  # fmt: skip
        trainer.train()
        found[weight] = trainer.evaluate()
        # Of all images, the last batch being a short one
        with torch.no_grad():
            assert found[weight]["eval_iou"] == pytest.approx(overlaps(model.eval(), unseen).mean().item(), abs=1e-6)
        assert trainer.predict(unseen).predictions.shape == (50, 3)
    assert found[0.5]["eval_iou"] >= found[0.0]["eval_iou"] + 0.2, found
    assert found[0.5]["eval_accuracy"] >= found[0.0]["eval_accuracy"] >= 0.9, found


@pytest.mark.parametrize("kind", ["classes", "many labels"])
def test_accumulated_batches_are_guided_as_one(small_config, tmp_path, kind):
    """Seven images, so that the last batch is a short one; a label of -100 does not count."""
    small_config.image_size = (48, 40)
    small_config.problem_type = "single_label_classification"
    rows = shapes(7, seed=0)
    rows[3]["labels"] = -100
    if kind == "many labels":
        small_config.problem_type = "multi_label_classification"
        rows = [{**row, "labels": torch.eye(5)[number % 5]} for number, row in enumerate(rows)]
    start = CrossViTForImageClassification(small_config).state_dict()
    weights = []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        model = CrossViTForImageClassification(small_config)
        model.load_state_dict(start)
        make_trainer(
            model, tmp_path, rows, max_steps=1, per_device_train_batch_size=batch_size, optim="sgd", learning_rate=0.1,
            gradient_accumulation_steps=accumulated, max_grad_norm=0, mask_weight=2.0,
        ).train()  # fmt: skip
        weights.append(model.state_dict())

    # By hand, from the definition
    model = CrossViTForImageClassification(small_config).train()
    model.load_state_dict(start)
    model.set_attn_implementation("eager")
    batch = collated(rows)
    loss = model(batch["pixel_values"], labels=batch["labels"]).loss
    counted = torch.tensor([kind == "many labels" or row["labels"] != -100 for row in rows])
    (loss + 2 * (1 - overlaps(model, rows))[counted].mean()).backward()
    for name, parameter in model.named_parameters():
        expected = parameter - 0.1 * parameter.grad
        for found in weights:  # 6e-8 was measured
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)


def test_evaluations_may_return_only_the_loss(small_config, tmp_path):
    small_config.image_size, rows = (48, 40), shapes(4, seed=0)
    trainer = make_trainer(CrossViTForImageClassification(small_config), tmp_path, evaluation=rows)
    loss = trainer.evaluate()["eval_loss"]
    trainer.args.prediction_loss_only = True
    assert trainer.evaluate()["eval_loss"] == loss
    assert trainer.predict(rows).predictions is None


def test_guidance_needs_the_gradient_of_the_attention(small_config, tmp_path):
    small_config.image_size, small_config.num_labels = (48, 40), 3
    rows = shapes(4, seed=0)

    def train(weight: float, reentrant: bool) -> None:
        options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
        model = CrossViTForImageClassification(small_config)
        make_trainer(model, tmp_path, rows, mask_weight=weight, max_steps=1, **options).train()

    train(1.0, reentrant=False)
    train(0.0, reentrant=True)  # which only reports
    with pytest.raises(ValueError, match=r'`activation_checkpointing_kwargs` to \{"use_reentrant": False\}'):
        train(1.0, reentrant=True)


@pytest.mark.parametrize(
    "options",
    [
        ["--image_columns", "photo", "mask"],  # a mask may also be an image
        ["--mask_weight", "0"],
        ["--lora_rank", "2"],
        ["--bf16", f"--{CHECKPOINTING}"],
    ],
    ids=lambda options: " ".join(options),
)
def test_the_command_reports_the_overlap(finetune, photos, options):
    folder = finetune("--mask_column", "mask", "--mask_weight", "2", "--num_train_epochs", "2", *options, data=photos)
    found, logged = results(folder), history(folder, "eval_iou")
    assert 0 < found["eval_iou"] < 1
    # Merging adapters rounds: 1.5e-8 was measured
    assert min(logged) - 1e-6 <= found["eval_iou"] <= max(logged) + 1e-6
    assert found["eval_accuracy"] >= 0 and (folder / "validation_confusion.png").is_file()
    assert all(weight.isfinite().all() for weight in load_file(folder / "model.safetensors").values())


def test_a_checkpoint_of_other_classes_is_guided(finetune, checkpoint, photos):
    """The encoder of such a checkpoint gets new heads; both must switch to eager attention."""
    options = "--image_columns photo --mask_column mask --mask_weight 2 --num_train_epochs 1".split()
    assert 0 < results(finetune(*options, model=checkpoint, data=photos))["eval_iou"] < 1


def test_masks_of_a_stream(finetune, photos, tmp_path):
    images = LabelledImages.load(ImageSource(str(photos), image_columns=["photo"]), "mask")
    datasets.DatasetDict(images.splits).save_to_disk(tmp_path / "saved")  # with classes, as a stream needs them
    options = "--image_columns photo --mask_column mask --streaming --learning_rate 0 --weight_decay 0".split()
    options += ["--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no", "--load_best_model_at_end", "no"]
    found = results(finetune(*options, data=tmp_path / "saved"))
    options.remove("--streaming")
    expected = results(finetune(*options, data=photos, output="other"))
    assert found["eval_iou"] == pytest.approx(expected["eval_iou"], abs=1e-6)


@pytest.mark.slow
def test_two_processes_are_guided_as_one(finetune, finetune_options, photos, tmp_path):
    options = "--optim sgd --learning_rate 0.1 --crop_scale 1 1 --horizontal_flip 0 --per_device_eval_batch_size 2"
    options = [*options.split(), *"--image_columns photo --mask_column mask --mask_weight 2".split()]
    one, two = finetune(*options, data=photos, output="one"), tmp_path / "two"
    options += ["--per_device_train_batch_size", "4"]
    torchrun(EXAMPLES / "finetune.py", *finetune_options(*options, data=photos, output="two"))
    assert_same_weights(two, one, atol=1e-6)
    np.testing.assert_allclose(history(two, "eval_iou"), history(one, "eval_iou"), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--mask_weight", "0.1"], "--mask_weight 0.1: needs --mask_column, the column of the masks"),
        (["--mask_column", "mask", "--mask_weight", "-1"], "--mask_weight -1.0: must be 0 or more"),
        (["--mask_column", "mask", "--mask_weight", "nan"], "--mask_weight nan: must be 0 or more"),
        (["--mask_column", "mask", "--mixup_alpha", "0.2"], "they do not mix masks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_named(failure, finetune_options, photos, options, message):
    assert message in failure("finetune", *finetune_options("--image_columns", "photo", *options, data=photos))


def test_example_trains_two_models_and_draws_them(example, tmp_path):
    output, _ = example("guided_attention", "--images", 32, "--epochs", 1, "--output", tmp_path / "new")
    assert len(re.findall(r"accuracy [\d.]+%, IoU 0\.\d\d$", output, flags=re.MULTILINE)) == 2
    with PIL.Image.open(tmp_path / "new" / "guided_attention.png") as picture:
        assert picture.width > picture.height > 600
    assert CrossViTForImageClassification.from_pretrained(tmp_path / "new").config.id2label[2] == "triangle"
