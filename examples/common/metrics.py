# Copyright 2026 The CrossViT for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
scikit-learn metrics of image classification, wrapped as `evaluate` metrics. Nothing is downloaded.

The Trainer takes `compute_metrics=metric.compute_metrics, preprocess_logits_for_metrics=metric.reduce_logits`.
"""

from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import sklearn.metrics
import torch
from matplotlib.figure import Figure
from transformers import EvalPrediction


TOP_K = 5
MAX_NAMES = 40  # more class names do not fit beside a confusion matrix


class OfflineMetric(evaluate.Metric):
    """A metric in memory, with the features of a prediction and a reference."""

    columns: dict[str, Any]

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", features=datasets.Features(self.columns), inputs_description=""
        )

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.compute(predictions=prediction.predictions, references=np.asarray(prediction.label_ids, dtype=int))


class SingleLabelMetric(OfflineMetric):
    """
    Accuracy and macro F1 of images with one label each, and top-5 accuracy if there are more than five classes.

    Inputs:
        predictions (`list[list[int]]`): the most likely classes of each image, from `reduce_logits`.
        references (`list[int]`): the class of each image; images with -100 do not count.

    Results:
        `dict[str, float]`: "accuracy", "f1" (the mean over all classes that occur) and "top5_accuracy".
    """

    columns = {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        ranking, labels = np.asarray(predictions), np.asarray(references)
        ranking, labels = ranking[labels != -100], labels[labels != -100]
        results = {
            "accuracy": sklearn.metrics.accuracy_score(labels, ranking[:, 0]),
            "f1": sklearn.metrics.f1_score(labels, ranking[:, 0], average="macro"),
        }
        if ranking.shape[1] == TOP_K:
            results["top5_accuracy"] = float((ranking == labels[:, None]).any(axis=1).mean())
        return results

    def reduce_logits(self, logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, classes) to the five most likely classes (batch, 5), or the best of up to five (batch, 1)."""
        return logits.topk(TOP_K if logits.shape[-1] > TOP_K else 1).indices


class MultiLabelMetric(OfflineMetric):
    """
    Metrics of images with any number of labels each: a class is predicted if its probability is at least a half.

    Inputs:
        predictions (`list[list[int]]`): zeros and ones, one per class.
        references (`list[list[int]]`): likewise.

    Results:
        `dict[str, float]`: "label_accuracy" of single labels, "exact_match" of all labels of an image, "f1" (the mean
        over the classes) and "micro_f1" (over all labels).
    """

    columns = dict.fromkeys(("predictions", "references"), datasets.Sequence(datasets.Value("int64")))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, labels = np.asarray(predictions), np.asarray(references)
        return {
            "label_accuracy": 1 - sklearn.metrics.hamming_loss(labels, predicted),
            "exact_match": sklearn.metrics.accuracy_score(labels, predicted),
            "f1": sklearn.metrics.f1_score(labels, predicted, average="macro", zero_division=0),
            "micro_f1": sklearn.metrics.f1_score(labels, predicted, average="micro", zero_division=0),
        }

    def reduce_logits(self, logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, classes) to predictions (batch, classes) of zeros and ones."""
        return (logits >= 0).long()


def save_confusion_matrix(path: Path, prediction: Any, class_names: list[str]) -> None:
    """
    Draws how often each class, a row of the picture, is predicted as each class, relative to its number of images.
    `prediction` comes from a Trainer with a [`SingleLabelMetric`].
    """
    side = min(4 + 0.35 * len(class_names), 16)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    few = len(class_names) <= MAX_NAMES
    sklearn.metrics.ConfusionMatrixDisplay.from_predictions(
        prediction.label_ids,
        prediction.predictions[:, 0],
        labels=range(len(class_names)),
        display_labels=[name.split(",")[0][:24].replace("$", r"\$") for name in class_names] if few else None,
        normalize="true",
        include_values=few,
        values_format=".2g",
        xticks_rotation="vertical",
        cmap="cividis",
        ax=figure.subplots(),
    )
    figure.savefig(path)
