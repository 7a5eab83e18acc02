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
Metrics of image classification, as metrics of the library evaluate that need no script from the Hub.

Each one has what the Trainer asks for: `Trainer(..., compute_metrics=metric.of_prediction,
preprocess_logits_for_metrics=metric.reduce_logits)`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction


CITATION = """\
@inproceedings{chen2021crossvit,
  title={{CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification}},
  author={Chen, Chun-Fu (Richard) and Fan, Quanfu and Panda, Rameswar},
  booktitle={ICCV},
  year={2021}
}"""

TOP_K = 5


class SingleLabelMetric(evaluate.Metric):
    """
    Accuracy, top-5 accuracy and macro F1 of images with one label each.

    Inputs:
        predictions (`list[list[int]]`): the classes of an image, the most likely first; five of them, or all.
        references (`list[int]`): its class; images with -100 do not count.

    Results:
        `dict[str, float]`: "accuracy", "top5_accuracy" (with fewer than five classes, always 1) and "f1": the mean of
        the F1 scores of all classes that occur, as scikit-learn's macro average.
    """

    names = ("accuracy", "top5_accuracy", "f1")

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(self.__doc__, CITATION, datasets.Features(features), inputs_description="")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        ranking, labels = without_ignored(np.asarray(predictions), np.asarray(references))
        if not len(labels):
            raise ValueError("There is no image with a label to compute the metrics of.")
        hits = ranking[:, :TOP_K] == labels[:, None]
        classes = int(max(ranking.max(), labels.max())) + 1
        predicted, present = np.bincount(ranking[:, 0], minlength=classes), np.bincount(labels, minlength=classes)
        matches = np.bincount(labels[hits[:, 0]], minlength=classes)
        occurs = predicted + present > 0
        return {
            "accuracy": float(hits[:, 0].mean()),
            "top5_accuracy": float(hits.any(axis=1).mean()),
            "f1": float(np.mean(2 * matches[occurs] / (predicted + present)[occurs])),
        }

    def rank(self, logits: torch.Tensor) -> torch.Tensor:
        """The most likely classes (batch, 5) by logits (batch, classes)."""
        return logits.topk(min(TOP_K, logits.shape[-1])).indices

    def reduce_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What is kept of logits (batch, classes), which together need not fit in memory: the ranking, and the loss of
        each image. The Trainer's own loss is a mean of means of batches, where images of a short one weigh more.
        """
        return self.rank(logits), nn.functional.cross_entropy(logits.float(), labels, reduction="none")

    def of_prediction(self, prediction: EvalPrediction) -> dict[str, float]:
        ranking, losses = tuple(prediction.predictions)
        metrics = self.compute(predictions=ranking, references=prediction.label_ids)
        return {"loss": mean_loss(losses[np.asarray(prediction.label_ids) != -100]), **metrics}


class MultiLabelMetric(evaluate.Metric):
    """
    Metrics of images with any number of labels each: a class is predicted if its probability is at least a half.

    Inputs:
        predictions (`list[list[int]]`): zeros and ones, one per class.
        references (`list[list[int]]`): likewise.

    Results:
        `dict[str, float]`: "label_accuracy" of single labels, "exact_match" of all labels of an image, "f1": the mean
        over the classes (of one without labels and predictions it is 0, as in scikit-learn), and "micro_f1": over all
        labels.
    """

    names = ("label_accuracy", "exact_match", "f1", "micro_f1")

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Sequence(datasets.Value("int64")) for name in ("predictions", "references")}
        return evaluate.MetricInfo(self.__doc__, CITATION, datasets.Features(features), inputs_description="")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, labels = np.asarray(predictions, dtype=bool), np.asarray(references, dtype=bool)
        if not len(labels):
            raise ValueError("There is no image with labels to compute the metrics of.")
        matches = (predicted & labels).sum(axis=0)
        marked = predicted.sum(axis=0) + labels.sum(axis=0)
        return {
            "label_accuracy": float((predicted == labels).mean()),
            "exact_match": float((predicted == labels).all(axis=1).mean()),
            "f1": float(np.mean(2 * matches / np.maximum(marked, 1))),
            "micro_f1": float(2 * matches.sum() / max(marked.sum(), 1)),
        }

    def reduce_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As in [`SingleLabelMetric`]: the predictions (batch, classes) and losses (batch)."""
        losses = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
        return (logits >= 0).long(), losses.mean(dim=-1)

    def of_prediction(self, prediction: EvalPrediction) -> dict[str, float]:
        predicted, losses = tuple(prediction.predictions)
        metrics = self.compute(predictions=predicted, references=np.asarray(prediction.label_ids).astype(int))
        return {"loss": mean_loss(losses), **metrics}


def confusion_matrix(predictions: np.ndarray, references: np.ndarray, num_classes: int) -> np.ndarray:
    """
    Counts images (classes, classes) by their class, the row, and by what they were taken for, the column.

    Args:
        predictions (`np.ndarray`): classes (images), or rankings (images, k), of which the first counts.
        references (`np.ndarray`): classes (images); images with -100 do not count.
    """
    predictions, references = without_ignored(np.asarray(predictions), np.asarray(references))
    best = predictions[:, 0] if predictions.ndim == 2 else predictions
    return np.bincount(references * num_classes + best, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_loss(losses: Any) -> float:
    return float(np.mean(losses, dtype=np.float64))


def without_ignored(predictions: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return predictions[references != -100], references[references != -100]


__all__ = ["MultiLabelMetric", "SingleLabelMetric", "confusion_matrix"]
