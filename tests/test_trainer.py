"""What CrossViTTrainer does differently: the loss; and what it decays."""

import numpy as np
import pytest
import torch
from small_training import arguments, images_of
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from transformers import TrainingArguments

from crossvit import CrossViTForImageClassification
from crossvit.training.augmentation import AugmentationArguments, Collator
from crossvit.training.trainer import CrossViTTrainer


@pytest.mark.parametrize("kind", ["classes", "probabilities", "many labels", "numbers"])
def test_accumulated_batches_train_as_one(small_config, tmp_path, kind):
    """Also where the last one is short. 6e-8 was measured."""
    small_config.problem_type = {"many labels": "multi_label_classification", "numbers": "regression"}.get(
        kind, "single_label_classification"
    )
    labels = {
        "classes": torch.arange(7) % 5,
        "probabilities": torch.rand(7, 5).softmax(dim=-1),
        "many labels": (torch.rand(7, 5) > 0.5).float(),
        "numbers": torch.randn(7, 5),
    }[kind]
    images = images_of(labels)
    start = CrossViTForImageClassification(small_config).state_dict()
    weights = []
    for batch_size, accumulated in ((7, 1), (2, 4)):
        model = CrossViTForImageClassification(small_config)
        model.load_state_dict(start)
        args = arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulated,
            optim="sgd", learning_rate=0.1, label_smoothing_factor=0.1, save_strategy="no", max_grad_norm=0,
        )  # fmt: skip
        CrossViTTrainer(model, args, train_dataset=images).train()
        weights.append(model.state_dict())

    # By hand, from the definition of each loss
    model = CrossViTForImageClassification(small_config).train()
    model.load_state_dict(start)
    logits = model(torch.stack([image["pixel_values"] for image in images])).logits
    loss = {
        "classes": lambda: -(0.9 * logits.log_softmax(-1)[range(7), labels] + 0.1 * logits.log_softmax(-1).mean(-1)),
        "probabilities": lambda: -((0.9 * labels + 0.02) * logits.log_softmax(-1)).sum(-1),
        "many labels": lambda: -(labels * logits.sigmoid().log() + (1 - labels) * (1 - logits.sigmoid()).log()),
        "numbers": lambda: (logits - labels) ** 2,
    }[kind]()
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        expected = parameter - 0.1 * parameter.grad
        for found in weights:
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)


def test_several_gpus_of_one_process_have_one_loss(small_config, tmp_path, monkeypatch):
    """`DataParallel` brings all logits together; the Trainer then multiplies the loss by the number of GPUs."""
    trainer = CrossViTTrainer(CrossViTForImageClassification(small_config), arguments(tmp_path))
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    loss = trainer.classification_loss({"logits": logits}, labels, torch.tensor(6).unsqueeze(0).expand(2, -1))
    torch.testing.assert_close(2 * loss, torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("multi_conv", [False, True])
def test_what_is_decayed_is_what_the_authors_script_decayed(small_config, tmp_path, multi_conv):
    """
    By the rule of timm 0.4.12, whose list of exceptions matched no parameter there: it named `cls_token`, but the
    parameters were `cls_token.0` and so on.
    """
    if multi_conv:
        small_config.image_size, small_config.patch_size, small_config.multi_conv = (48, 64), (12, 16), True
    model = CrossViTForImageClassification(small_config)
    trainer = CrossViTTrainer(model, arguments(tmp_path, weight_decay=0.05))
    trainer.create_optimizer()
    decays = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or name.endswith(".bias")
        assert decays[id(parameter)] == (0.0 if plain else 0.05), name


def test_mixing_and_label_smoothing_equal_those_of_the_authors_script(small_config, tmp_path):
    """There, timm's `Mixup` smooths the labels before it mixes them; here, the loss smooths the mixed labels."""
    small_config.problem_type = "single_label_classification"
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    trainer = CrossViTTrainer(CrossViTForImageClassification(small_config), args)
    theirs = Mixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=5
    )
    collator = Collator(5, mixup=AugmentationArguments(mixup_alpha=0.8, cutmix_alpha=1.0).mixup(5))
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels)]
    for seed in range(8):  # some of each kind
        np.random.seed(seed)
        mixed, targets = theirs(images.clone(), labels)
        np.random.seed(seed)
        batch = collator(rows)
        assert torch.equal(batch["pixel_values"], mixed)
        logits = torch.randn(6, 5, requires_grad=True)
        loss = trainer.classification_loss({"logits": logits}, batch["labels"], batch["labels"].numel())
        torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, targets))


def test_evaluations_do_not_smooth_labels(small_config, tmp_path):
    images, model = images_of(torch.arange(8) % 5), CrossViTForImageClassification(small_config).eval()
    trainer = CrossViTTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1), eval_dataset=images)
    with torch.no_grad():
        loss = model(torch.stack([image["pixel_values"] for image in images]), labels=torch.arange(8) % 5).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)  # with smoothing it is 0.06 % less
