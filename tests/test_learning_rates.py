"""The schedule of the authors' script at every step, and layer-wise learning rate decay as in timm."""

from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import to_transformers_name
from small_training import arguments
from timm.optim import param_groups_layer_decay
from timm_reference import authors_learning_rates, timm_of_config
from transformers import TrainerCallback

from crossvit import CrossViTForImageClassification
from crossvit.training.learning_rates import cosine_by_epoch, layer_decay_groups
from crossvit.training.trainer import CrossViTTrainer


@pytest.mark.parametrize(
    "epochs, warmup_epochs, steps_per_epoch",
    [(300, 30, 3), (300, 5, 1), (100, 10, 7), (12, 3, 50), (7, 0, 2), (1, 0, 9)],
)
def test_every_step_has_the_learning_rate_of_the_authors_script(epochs, warmup_epochs, steps_per_epoch):
    steps = epochs * steps_per_epoch
    schedule = partial(
        cosine_by_epoch, num_warmup_steps=warmup_epochs * steps_per_epoch, num_training_steps=steps,
        num_epochs=float(epochs), warmup_lr_rate=1e-6 / 0.004, min_lr_rate=1e-5 / 0.004,
    )  # fmt: skip
    expected = np.repeat(authors_learning_rates(epochs, warmup_epochs, peak=0.004), steps_per_epoch)
    # Both round in float64: 4e-16 was measured
    np.testing.assert_allclose([0.004 * schedule(step) for step in range(steps)], expected, rtol=1e-13)


@pytest.mark.parametrize("num_warmup_steps", [99, 101])
def test_a_number_of_steps_is_divided_into_the_epochs(num_warmup_steps):
    """As for `max_steps`, which need not be a multiple of the epochs. The warmup is rounded to 30 epochs."""
    schedule = partial(cosine_by_epoch, num_warmup_steps=num_warmup_steps, num_training_steps=1001, num_epochs=300.0)
    expected = authors_learning_rates(300, 30, peak=1.0, warmup=0.0, end=0.0)
    for step in range(1001):
        assert schedule(step) == pytest.approx(expected[step * 300 // 1001], rel=1e-13, abs=1e-16), step


def test_the_trainer_follows_a_schedule_and_resumes_it(small_config, tmp_path):
    images = [{"pixel_values": torch.randn(3, 36, 36), "labels": label % 5} for label in range(4)]
    args = arguments(
        tmp_path, num_train_epochs=6, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
        save_steps=5, warmup_steps=4,
    )  # fmt: skip
    schedule = partial(cosine_by_epoch, num_epochs=6, warmup_lr_rate=1e-3, min_lr_rate=1e-2)
    expected = np.repeat(authors_learning_rates(6, 2, peak=1e-3), 2)
    for checkpoint in (None, tmp_path / "checkpoint-5"):
        trainer = CrossViTTrainer(
            CrossViTForImageClassification(small_config), args, train_dataset=images, learning_rate_schedule=schedule
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        np.testing.assert_allclose(rates, expected, rtol=1e-13)


def rates_and_decays(groups: list[dict], rate: str) -> dict[int, tuple[float, float]]:
    return {id(parameter): (group[rate], group["weight_decay"]) for group in groups for parameter in group["params"]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": ((1, 2, 1),) * 3},
        {"depth": ((2, 3, 2), (1, 1, 0)), "qkv_bias": False},
        {"depth": ((1, 4, 0),)},
        # crossvit_15_dagger, but for its width
        {"depth": ((1, 5, 0),) * 3, "multi_conv": True, "image_size": (240, 224), "patch_size": (12, 16)},
    ],
    ids=str,
)
def test_layer_decay_has_the_groups_of_timm(small_config, options):
    small_config.depth = ((1, 2, 0), (1, 1, 0))
    for name, value in options.items():
        setattr(small_config, name, value)
    reference, model = timm_of_config(small_config), CrossViTForImageClassification(small_config)
    expected = rates_and_decays(
        param_groups_layer_decay(reference, 0.05, reference.no_weight_decay(), layer_decay=0.75), "lr_scale"
    )
    found = rates_and_decays(layer_decay_groups(model, 0.75, learning_rate=1.0, weight_decay=0.05), "lr")
    parameters = dict(model.named_parameters())
    assert len(found) == len(parameters)
    for name, parameter in reference.named_parameters():
        assert found[id(parameters[to_transformers_name(name)])] == expected[id(parameter)], name


def test_layer_decay_of_adapters_and_frozen_layers(small_config):
    model = CrossViTForImageClassification(small_config)
    model.crossvit.embeddings.requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert rates_and_decays(layer_decay_groups(model, 0.5, 1.0, 0.1), "lr").keys() == set(map(id, trainable))

    adapted = get_peft_model(model, LoraConfig(target_modules=["qkv"], modules_to_save=["classifier"]))
    found = rates_and_decays(layer_decay_groups(adapted, 0.5, 1.0, 0.1), "lr")
    trainable = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert found.keys() == set(map(id, trainable.values()))
    for name, parameter in trainable.items():
        rate = 0.25 if "stages.0" in name else 0.5 if "stages.1" in name else 1.0
        assert found[id(parameter)] == (rate, 0.0 if name.endswith("bias") else 0.1), name


def test_layers_move_by_their_learning_rates(small_config, tmp_path):
    images = [{"pixel_values": torch.randn(3, 36, 36), "labels": label % 5} for label in range(4)]
    args = arguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, optim="sgd", learning_rate=0.1, logging_steps=1,
        max_grad_norm=0, save_strategy="no",
    )  # fmt: skip
    start = CrossViTForImageClassification(small_config).state_dict()
    moves = {}

    class FirstStep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                moves[decay] = {name: weight.detach() - start[name] for name, weight in model.named_parameters()}

    for decay in (None, 0.5):
        model = CrossViTForImageClassification(small_config)
        model.load_state_dict(start)
        trainer = CrossViTTrainer(model, args, train_dataset=images, layer_decay=decay, callbacks=[FirstStep()])
        trainer.train()
        # Linear, and that of the heads
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
    for name, scale in (
        ("embeddings.0.cls_token", 0.125), ("stages.0.branches.1.layers.0.attention.qkv.weight", 0.25),
        ("stages.1.fusions.0.projection.dense.weight", 0.5), ("layernorms.0.bias", 0.5),
    ):  # fmt: skip
        move = moves[None][f"crossvit.{name}"]
        # Weights of up to 1 have a resolution of 6e-8
        assert move.abs().max() > 1e-5
        torch.testing.assert_close(moves[0.5][f"crossvit.{name}"], scale * move, atol=1.2e-7, rtol=0)
    assert torch.equal(moves[0.5]["classifier.heads.0.weight"], moves[None]["classifier.heads.0.weight"])


def test_a_schedule_scales_all_groups(small_config, tmp_path):
    args = arguments(tmp_path, learning_rate=0.1, warmup_steps=2, lr_scheduler_type="cosine")
    schedule = partial(cosine_by_epoch, num_epochs=4)
    for options in ({}, {"learning_rate_schedule": schedule}):
        trainer = CrossViTTrainer(CrossViTForImageClassification(small_config), args, layer_decay=0.5, **options)
        trainer.create_optimizer_and_scheduler(num_training_steps=8)
        for _ in range(7):
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            scales = [group["lr"] / group["initial_lr"] for group in trainer.optimizer.param_groups]
            assert scales == pytest.approx([scales[0]] * 8)
        assert 0 < scales[0] < 1
        rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
        assert rates == {0.1, 0.05, 0.025, 0.0125}


@pytest.mark.parametrize("layer_decay", [0, -0.5, 1.1, float("nan")])
def test_wrong_layer_decays_are_refused(small_config, tmp_path, layer_decay):
    with pytest.raises(
        ValueError, match=f"`layer_decay` must be above 0 and at most 1, such as 0.75, got {layer_decay}"
    ):
        CrossViTTrainer(CrossViTForImageClassification(small_config), arguments(tmp_path), layer_decay=layer_decay)
