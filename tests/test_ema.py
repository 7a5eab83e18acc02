"""The average of the weights is the one of its formula, and the model has it when it is asked for."""

import numpy as np
import pytest
import torch
from torch import nn

from crossvit.training.ema import ExponentialMovingAverage


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    return model


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: weight.detach().double().numpy().copy() for name, weight in model.named_parameters()}


def train(model, average, steps: int) -> list[dict[str, np.ndarray]]:
    """Changes the trainable weights at random; returns those after each step."""
    trajectory = []
    for step in range(1, steps + 1):
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
    """Up to 20 in float32, after up to 100 steps: they differed by 3.5e-6."""
    found = weights_of(model)
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("decay", [0.5, 0.9999])
@pytest.mark.parametrize("steps", [1, 100])
def test_averages_follow_their_formula_and_are_applied_for_a_while(model, decay, steps):
    start = weights_of(model)
    average = ExponentialMovingAverage(model, decay)
    trajectory = train(model, average, steps)
    expected = expected_average(start, trajectory, decay)
    with pytest.raises(KeyError), average.applied():
        assert_weights(model, expected)
        raise KeyError
    assert_weights(model, trajectory[-1])
    average.apply()
    assert_weights(model, expected)
    assert (weights_of(model)["2.weight"] == start["2.weight"]).all()  # frozen


def test_averages_of_half_precision():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(model.weight)
    average = ExponentialMovingAverage(model, 0.999)
    nn.init.ones_(model.weight)
    for step in range(10_000, 13_000):
        average.update(step)
    average.apply()
    # bfloat16 resolves 0.004 there; an average in bfloat16 would stay at 0
    assert model.weight.item() == pytest.approx(1 - 0.999**3000, abs=0.004)
