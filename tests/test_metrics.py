"""Metrics are those of scikit-learn, whatever the batches, and need neither a network nor files."""

import socket

import evaluate
import numpy as np
import pytest
import sklearn.metrics
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from crossvit import CrossViTForImageClassification
from crossvit.interpretability.plotting import draw_confusion_matrix
from crossvit.training.metrics import MultiLabelMetric, SingleLabelMetric, confusion_matrix


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    yield
    assert [path for path in tmp_path.rglob("cache/**/*") if path.is_file()] == []


def random_scores(images: int, classes: int, present: list[int] | None = None, seed: int = 0):
    generator = np.random.default_rng(seed)
    labels = generator.choice(present or classes, images)
    return generator.normal(size=(images, classes)).astype(np.float32) + 2 * np.eye(classes)[labels], labels


def ranked(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, axis=1)[:, :5]


def expected_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    best, classes = scores.argmax(axis=1), scores.shape[1]
    top5 = sklearn.metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(classes)) if classes > 5 else 1.0
    return {
        "accuracy": sklearn.metrics.accuracy_score(labels, best),
        "top5_accuracy": top5,
        "f1": sklearn.metrics.f1_score(labels, best, average="macro"),
    }


@pytest.mark.parametrize(
    "classes, present",
    [(10, None), (10, [0, 3, 9]), (300, None), (6, [2]), (5, None), (3, None), (2, [1])],
    ids=str,
)
def test_single_labels_as_scikit_learn(classes, present):
    scores, labels = random_scores(83, classes, present)
    metric = SingleLabelMetric()
    expected = expected_metrics(scores, labels)
    assert metric.compute(predictions=ranked(scores), references=labels) == pytest.approx(expected, abs=1e-12)
    # In pieces, and anew
    for _ in range(2):
        for start, end in [(0, 30), (30, 31), (31, 83)]:
            metric.add_batch(predictions=torch.tensor(ranked(scores)[start:end]), references=labels[start:end])
        assert metric.compute() == pytest.approx(expected, abs=1e-12)


def test_classes_that_are_never_predicted():
    scores, labels = random_scores(40, 8)
    scores[:, 3] = -99
    expected = expected_metrics(scores, labels)
    assert 3 in labels and 3 not in scores.argmax(axis=1)
    found = SingleLabelMetric().compute(predictions=ranked(scores), references=labels)
    assert found == pytest.approx(expected, abs=1e-12)


def test_images_without_a_label_do_not_count():
    scores, labels = random_scores(50, 7)
    known = np.arange(50) % 3 != 0
    masked = np.where(known, labels, -100)
    found = SingleLabelMetric().compute(predictions=ranked(scores), references=masked)
    assert found == pytest.approx(expected_metrics(scores[known], labels[known]), abs=1e-12)
    matrix = confusion_matrix(ranked(scores), masked, 7)
    expected = sklearn.metrics.confusion_matrix(labels[known], scores[known].argmax(axis=1), labels=range(7))
    np.testing.assert_array_equal(matrix, expected)


@pytest.mark.parametrize("metric", [SingleLabelMetric, MultiLabelMetric])
def test_nothing_has_no_metrics(metric):
    with pytest.raises(ValueError):
        metric().compute(predictions=[], references=[])


def test_nothing_but_images_without_a_label():
    with pytest.raises(ValueError, match="no image with a label"):
        SingleLabelMetric().compute(predictions=[[0, 1], [1, 0]], references=[-100, -100])


@pytest.mark.parametrize("classes", [1, 6])
def test_several_labels_as_scikit_learn(classes):
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(45, classes)), generator.integers(0, 2, (45, classes))
    if classes > 3:
        logits[:, 2], labels[:, 2] = -1, 0  # never there, never predicted
        labels[:, 3] = 0
    predicted = (1 / (1 + np.exp(-logits)) >= 0.5).astype(int)
    expected = {
        "label_accuracy": 1 - sklearn.metrics.hamming_loss(labels, predicted),
        "exact_match": sklearn.metrics.accuracy_score(labels, predicted),
        "f1": np.mean([sklearn.metrics.f1_score(*pair, zero_division=0) for pair in zip(labels.T, predicted.T)]),
        "micro_f1": sklearn.metrics.f1_score(labels.ravel(), predicted.ravel()),
    }
    metric = MultiLabelMetric()
    assert metric.compute(predictions=predicted, references=labels) == pytest.approx(expected, abs=1e-12)
    for start in range(0, 45, 20):
        metric.add_batch(predictions=predicted[start : start + 20], references=labels[start : start + 20])
    assert metric.compute() == pytest.approx(expected, abs=1e-12)
    reduced = metric.reduce_logits(torch.tensor(logits), torch.tensor(labels).float())
    np.testing.assert_array_equal(reduced[0], predicted)
    found = metric.of_prediction(EvalPrediction(tuple(map(np.asarray, reduced)), labels.astype(np.float32)))
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    # float32 losses
    probabilities = 1 / (1 + np.exp(-logits))
    losses = [sklearn.metrics.log_loss(row, p, labels=[0, 1]) for row, p in zip(labels, probabilities)]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("classes", [3, 9])
def test_logits_are_reduced_to_the_best_classes(classes):
    scores, labels = random_scores(20, classes)
    metric = SingleLabelMetric()
    reduced = metric.reduce_logits(torch.tensor(scores), torch.tensor(labels))
    np.testing.assert_array_equal(reduced[0], ranked(scores))
    found = metric.of_prediction(EvalPrediction(tuple(map(np.asarray, reduced)), labels))
    assert {key: found[key] for key in ("accuracy", "top5_accuracy", "f1")} == pytest.approx(
        expected_metrics(scores, labels), abs=1e-12
    )
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert found["loss"] == pytest.approx(
        sklearn.metrics.log_loss(labels, probabilities, labels=range(classes)), rel=1e-5
    )


def test_losses_of_images_without_a_label_do_not_count():
    scores, labels = random_scores(20, 4)
    masked = np.where(np.arange(20) < 10, labels, -100)
    metric = SingleLabelMetric()
    losses = []
    for scored, known in ((scores, masked), (scores[:10], labels[:10])):
        reduced = metric.reduce_logits(torch.tensor(scored), torch.tensor(known))
        losses.append(metric.of_prediction(EvalPrediction(tuple(map(np.asarray, reduced)), known))["loss"])
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("present", [None, [1, 4]])
def test_confusion_as_scikit_learn(present):
    scores, labels = random_scores(60, 6, present)
    expected = sklearn.metrics.confusion_matrix(labels, scores.argmax(axis=1), labels=range(6))
    np.testing.assert_array_equal(confusion_matrix(ranked(scores), labels, 6), expected)
    np.testing.assert_array_equal(confusion_matrix(scores.argmax(axis=1), labels, 6), expected)


@pytest.mark.parametrize("images", [3, 8, 11])
def test_short_last_batches_count_as_they_should(small_config, tmp_path, images):
    model = CrossViTForImageClassification(small_config).eval()
    pixel_values = torch.randn(images, 3, 36, 32)
    labels = torch.arange(images) % 5
    with torch.no_grad():
        logits = model(pixel_values).logits
    metric = SingleLabelMetric()
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path / "run", per_device_eval_batch_size=4, report_to="none", use_cpu=True),
        eval_dataset=[{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, labels)],
        compute_metrics=metric.of_prediction,
        preprocess_logits_for_metrics=metric.reduce_logits,
    )
    found = trainer.evaluate()
    expected = {
        "eval_accuracy": sklearn.metrics.accuracy_score(labels, logits.argmax(dim=1)),
        "eval_top5_accuracy": 1.0,
        "eval_f1": sklearn.metrics.f1_score(labels, logits.argmax(dim=1), average="macro"),
        "eval_loss": torch.nn.functional.cross_entropy(logits, labels).item(),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("classes", [3, 60])
def test_confusion_is_drawn(tmp_path, classes):
    matrix = np.random.default_rng(0).integers(0, 3, (classes, classes))
    matrix[1] = 0
    figure = draw_confusion_matrix(matrix, [f"class {number}, a long name" for number in range(classes)])
    figure.savefig(tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    axis = figure.axes[0]
    assert f"{np.trace(matrix):,} of {matrix.sum():,} " in axis.get_title()
    shown = np.asarray(axis.images[0].get_array())
    np.testing.assert_allclose(shown[0], matrix[0] / matrix[0].sum())
    np.testing.assert_array_equal(shown[1], 0)
    if classes == 3:
        assert [label.get_text() for label in axis.get_yticklabels()] == ["class 0", "class 1", "class 2"]
        assert {(*text.get_position(), text.get_text()) for text in axis.texts} == {
            (column, row, str(matrix[row, column])) for row, column in zip(*matrix.nonzero())
        }


@pytest.mark.parametrize("names", [["$x^$", "a"], ["$5", "10 $"], ["a_b", "50%"], ["\\frac", "^"]], ids=str)
def test_names_of_classes_are_no_formulas(tmp_path, names):
    figure = draw_confusion_matrix(np.eye(2, dtype=int), names)
    figure.savefig(tmp_path / "confusion.png")
    assert [label.get_text().replace("\\$", "$") for label in figure.axes[0].get_xticklabels()] == names
