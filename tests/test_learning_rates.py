"""The schedule of the authors' script, step by step."""

from functools import partial

import numpy as np
import pytest
import torch
from small_training import arguments
from timm_reference import authors_learning_rates

from crossvit import CrossViTForImageClassification
from crossvit.training.learning_rates import cosine_by_epoch
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
