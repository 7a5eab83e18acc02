"""What fine-tuning relies on: the Trainer, PEFT, sharding."""

import re

import numpy as np
import pytest
import torch
from small_training import CHECKPOINTING, accuracy, arguments
from timm_reference import perturb
from transformers import Trainer

from crossvit import CrossViTForImageClassification


def images(length: int, shape: tuple[int, ...] = (3, 36, 36)) -> list[dict[str, torch.Tensor]]:
    """Images, or one for each branch, whose class is their brightest channel."""
    pixel_values, labels = torch.randn(length, *shape), torch.arange(length) % 3
    pixel_values[torch.arange(length), ..., labels, :, :] += 1
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, labels)]


def make_trainer(model, folder, train, evaluation, **options) -> Trainer:
    defaults = {
        "num_train_epochs": 6,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 2e-3,
        "save_strategy": "no",
    }
    return Trainer(
        model,
        arguments(folder / "trainer", **{**defaults, **options}),
        train_dataset=train,
        eval_dataset=evaluation,
        compute_metrics=accuracy_of_logits,
    )


def accuracy_of_logits(prediction) -> dict[str, float]:
    # An array, not a tuple of outputs: `keys_to_ignore_at_inference` leaves only the logits
    assert isinstance(prediction.predictions, np.ndarray) and prediction.predictions.ndim == 2
    return accuracy(prediction)


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_trainer_learns_evaluates_only_logits_and_saves(small_config, tmp_path, options):
    small_config.num_labels = 3
    # Outputs that the config asks for are not predictions either
    small_config._attn_implementation = "eager"
    small_config.output_hidden_states = small_config.output_attentions = True
    model = CrossViTForImageClassification(small_config)
    trainer = make_trainer(model, tmp_path, images(96), images(44), **options)  # 44: the last batch is a short one
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] >= 0.9  # 1.0 was measured, 1/3 is chance

    trainer.save_model(tmp_path / "saved")
    reloaded = CrossViTForImageClassification.from_pretrained(tmp_path / "saved")
    weights = reloaded.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("shape", [(3, 36, 36), (2, 3, 36, 36)])
def test_lora_trains_every_branch_and_keeps_the_heads(small_config, tmp_path, shape):
    peft = pytest.importorskip("peft")
    small_config.num_labels = 3
    base = perturb(CrossViTForImageClassification(small_config))
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(r=4, target_modules=["qkv", "q_proj", "v_proj", "o_proj"], modules_to_save=["classifier"]),
    )
    model.enable_input_require_grads()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # Reentrant checkpointing passes gradients on only where inputs require them: in every branch
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    trainer = make_trainer(model, tmp_path, images(96, shape), images(44, shape), **options)
    trainer.train()
    trained = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for branch in (0, 1):
        assert any(f"branches.{branch}.layers.0.attention.qkv.lora_B" in name for name in trained)
        assert any(f"fusions.{branch}.layers.0.attention.v_proj.lora_B" in name for name in trained)
        assert any(f"classifier.modules_to_save.default.heads.{branch}.weight" in name for name in trained)
    assert trainer.evaluate()["eval_accuracy"] >= 0.9

    model.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(
        CrossViTForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    pixel_values = torch.randn(2, *shape)
    with torch.no_grad():
        expected = model.eval()(pixel_values).logits
        torch.testing.assert_close(reloaded.eval()(pixel_values).logits, expected)
        merged = reloaded.merge_and_unload()(pixel_values).logits
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)


def test_sharding_plan_covers_every_parameter(small_config):
    model = CrossViTForImageClassification(small_config).crossvit
    patterns = {
        pattern: re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"\..+")
        for pattern in small_config.base_model_fsdp_plan
    }
    covered = {
        name: [pattern for pattern, expression in patterns.items() if expression.fullmatch(name)]
        for name, _ in model.named_parameters()
    }
    assert all(len(matches) == 1 for matches in covered.values()), covered
    assert {matches[0] for matches in covered.values()} == patterns.keys()
