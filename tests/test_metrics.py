"""Metrics count the images and labels that they should."""

import numpy as np
import PIL.Image
import pytest
import torch
from common.metrics import MultiLabelMetric, SingleLabelMetric, save_confusion_matrix
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput


def test_accuracy_and_f1_by_hand():
    logits = torch.tensor([[3.0, 1, 0], [0, 3, 1], [3, 0, 1], [0, 1, 3]])
    metric = SingleLabelMetric()
    ranking = metric.reduce_logits(logits)
    assert ranking.tolist() == [[0], [1], [0], [2]]
    # Precision and recall of the classes: 1/2 and 1, 1 and 1/2, 1 and 1
    expected = {"accuracy": 0.75, "f1": (2 / 3 + 2 / 3 + 1) / 3}
    assert metric.compute(predictions=ranking, references=[0, 1, 1, 2]) == pytest.approx(expected)
    for label, best in zip([0, 1, 1, 2], ranking):
        metric.add(prediction=best, reference=label)
    assert metric.compute() == pytest.approx(expected)
    # An image without a label
    ignored = EvalPrediction(np.array([[0], [1], [0], [2], [0]]), np.array([0, 1, 1, 2, -100]))
    assert metric.compute_metrics(ignored) == pytest.approx(expected)


def test_top_5_needs_more_than_five_classes():
    metric = SingleLabelMetric()
    logits = torch.arange(6.0).expand(4, 6)
    found = metric.compute_metrics(EvalPrediction(metric.reduce_logits(logits).numpy(), np.array([5, 1, 0, 0])))
    assert found["accuracy"] == 0.25 and found["top5_accuracy"] == 0.5
    five = metric.compute_metrics(EvalPrediction(metric.reduce_logits(logits[:, :5]).numpy(), np.array([4, 1, 0, 0])))
    assert five.keys() == {"accuracy", "f1"}


def test_many_labels_by_hand():
    logits = torch.tensor([[2.0, -1, 0], [-1, -2, -3], [1, 1, -1]])
    labels = torch.tensor([[1.0, 0, 1], [1, 0, 0], [1, 1, 0]])
    metric = MultiLabelMetric()
    predicted = metric.reduce_logits(logits, labels)
    assert predicted.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    found = metric.compute_metrics(EvalPrediction(predicted.numpy(), labels.numpy()))
    expected = {"label_accuracy": 8 / 9, "exact_match": 2 / 3, "f1": (4 / 5 + 1 + 1) / 3, "micro_f1": 8 / 9}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("names", [["$x^$", "a_b"], [f"class {number}, a long name" for number in range(60)]], ids=len)
def test_confusion_is_drawn(tmp_path, names):
    """Names of classes are not formulas, and many do not fit."""
    labels = np.arange(len(names)) // 2 * 2  # not all classes occur
    prediction = PredictionOutput(labels[:, None], labels, {})
    save_confusion_matrix(tmp_path / "confusion.png", prediction, names)
    with PIL.Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300
