"""The model card of a trained model."""

import json

import pytest
import torch
from common.model_card import ModelCardTrainer
from huggingface_hub import ModelCard
from small_training import accuracy, arguments, images_of

from crossvit import CrossViTForImageClassification


@pytest.fixture
def trainer(small_config, tmp_path):
    args = arguments(
        tmp_path / "tuned", max_steps=2, logging_steps=1, eval_strategy="steps", save_steps=1, eval_steps=1
    )
    images = images_of(torch.arange(9) % 5)
    return ModelCardTrainer(
        CrossViTForImageClassification(small_config), args, train_dataset=images, eval_dataset=images,
        compute_metrics=accuracy,
    )  # fmt: skip


def card_of(trainer, **options) -> ModelCard:
    trainer.create_model_card(**options)
    card = ModelCard.load(f"{trainer.args.output_dir}/README.md")
    assert card.data.library_name == "transformers" and "crossvit" in card.data.tags
    return card


def test_the_card_has_the_results_rounded_and_in_their_columns(trainer):
    trainer.train()
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    log = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    card = card_of(trainer, dataset="me/zoo", dataset_tags="me/zoo", license="mit")
    (result,) = card.data.eval_results
    assert result.metric_value == round(log[-1]["eval_accuracy"], 4) and result.dataset_type == "me/zoo"
    assert card.data.datasets == ["me/zoo"] and card.data.license == "mit"
    table = [[cell.strip() for cell in line.split("|")] for line in card.text.splitlines() if line.startswith("| ")]
    loss, found = table[0].index("Validation Loss"), table[0].index("Accuracy")
    for row, entry in zip(table[1:], log, strict=True):
        # One is rounded by the Trainer, the other is a number of up to four decimals
        assert float(row[loss]) == pytest.approx(entry["eval_loss"], abs=6e-5)
        assert float(row[found]) == pytest.approx(entry["eval_accuracy"], abs=6e-5)


def test_the_card_names_the_origin_that_is_known(trainer, tmp_path):
    config, folder = trainer.model.config, tmp_path / "checkpoint"
    card = card_of(trainer)
    assert "trained from scratch on" in card.text and card.data.base_model is None
    config._name_or_path = "me/crossvit_15"  # as `from_pretrained` leaves it
    assert card_of(trainer).data.base_model == "me/crossvit_15"

    folder.mkdir()
    config._name_or_path = str(folder)
    card = card_of(trainer)
    assert card.data.base_model is None and "a fine-tuned version of a local checkpoint on" in card.text
    assert str(tmp_path) not in str(card)
    (folder / "README.md").write_text("---\nbase_model: me/first\n---\n")
    assert card_of(trainer).data.base_model == "me/first"
    record = {"source": {"repository": "timm/crossvit_15_240.in1k"}}
    (folder / "conversion.json").write_text(json.dumps(record))
    assert card_of(trainer).data.base_model == "timm/crossvit_15_240.in1k"
