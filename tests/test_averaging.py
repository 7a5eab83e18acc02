"""The average of the weights is the one of its formula, and the model has it when it is asked for."""

import numpy as np
import pytest
import torch
from torch import nn

from crossvit.training.averaging import ExponentialMovingAverage


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    return model


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: weight.detach().double().numpy().copy() for name, weight in model.named_parameters()}


def train(model, average, steps: range) -> list[dict[str, np.ndarray]]:
    """Changes the trainable weights at random; returns those after each step."""
    trajectory = []
    for step in steps:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += torch.randn_like(weight)
        average.update(step)
        trajectory.append(weights_of(model))
    return trajectory


def expected_average(start, trajectory, decay: float):
    expected = start
    for step, weights in enumerate(trajectory, 1):
        kept = min(decay, (1 + step) / (10 + step))
        expected = {name: kept * expected[name] + (1 - kept) * weights[name] for name in weights}
    return expected


def assert_weights(model, expected):
    found = weights_of(model)
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_averages_follow_their_formula(model, decay, steps):
    start = weights_of(model)
    average = ExponentialMovingAverage(model, decay)
    trajectory = train(model, average, range(1, steps + 1))
    assert_weights(model, trajectory[-1])
    average.apply()
    assert_weights(model, expected_average(start, trajectory, decay))


def test_the_first_steps_count_more():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = ExponentialMovingAverage(model, 0.9999)
    nn.init.ones_(model.weight)
    average.update(1)
    average.apply()
    assert model.weight.item() == pytest.approx(9 / 11)


def test_averages_are_applied_for_a_while(model):
    start = weights_of(model)
    average = ExponentialMovingAverage(model, 0.9)
    trajectory = train(model, average, range(1, 6))
    expected = expected_average(start, trajectory, 0.9)
    parameters = list(model.parameters())
    with average.applied():
        assert_weights(model, expected)
    assert_weights(model, trajectory[-1])
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert_weights(model, trajectory[-1])
    assert all(first is second for first, second in zip(parameters, model.parameters()))
    # It goes on as if nothing had been
    trajectory += train(model, average, range(6, 9))
    average.apply()
    assert_weights(model, expected_average(start, trajectory, 0.9))


def test_applied_averages_take_no_part_in_training(model):
    average = ExponentialMovingAverage(model, 0.9)
    with average.applied():
        assert all(weight.grad_fn is None for weight in model.parameters())
    average.apply()
    model(torch.randn(5, 3)).sum().backward()
    assert model[0].weight.grad is not None and all(weight.is_leaf for weight in model.parameters())
    assert not any(weight.requires_grad for weight in average.averages)


def test_frozen_weights_stay(model):
    frozen = model[2].weight.clone()
    average = ExponentialMovingAverage(model, 0.5)
    nn.init.zeros_(model[2].weight)
    average.update(1)
    with average.applied():
        assert not model[2].weight.any()
    average.apply()
    assert frozen.any() and not model[2].weight.any()


def test_averages_begin_anew(model):
    average = ExponentialMovingAverage(model, 0.9)
    train(model, average, range(1, 6))
    start = weights_of(model)
    average.restart()
    trajectory = train(model, average, range(1, 4))
    average.apply()
    assert_weights(model, expected_average(start, trajectory, 0.9))


def test_averages_of_half_precision():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(model.weight)
    average = ExponentialMovingAverage(model, 0.999)
    nn.init.ones_(model.weight)
    for step in range(10_000, 13_000):
        average.update(step)
    average.apply()
    assert model.weight.item() == pytest.approx(1 - 0.999**3000, abs=0.01)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5, 10, float("nan")])
def test_wrong_decays_are_refused(model, decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        ExponentialMovingAverage(model, decay)
