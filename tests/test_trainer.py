"""What the card of a fine-tuned model says is what is known."""

import pytest
import torch
from hub_server import check_card
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from crossvit import CrossViTForImageClassification
from crossvit.trainer import CrossViTTrainer


CLASSES = ["ant", "bee", "cow", "dog", "elk"]


@pytest.fixture
def trainer(small_config, tmp_path):
    small_config.id2label = dict(enumerate(CLASSES))
    model = CrossViTForImageClassification(small_config)
    images = [{"pixel_values": torch.randn(3, 36, 36), "labels": index % 5} for index in range(10)]
    return CrossViTTrainer(
        model,
        TrainingArguments(
            tmp_path / "tuned", max_steps=2, logging_steps=1, eval_strategy="epoch", report_to="none", use_cpu=True
        ),
        train_dataset=images,
        eval_dataset=images,
        compute_metrics=lambda prediction: {
            "accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean().item()
        },
    )


def card_of(trainer, **options) -> ModelCard:
    trainer.create_model_card(**options)
    card = ModelCard.load(f"{trainer.args.output_dir}/README.md")
    assert check_card(str(card)) == []
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-classification"
    assert {"crossvit", "generated_from_trainer"} <= set(card.data.tags)
    assert "ant; bee; cow; dog; elk" in card.text and "ImageNet" not in str(card)
    return card


def test_a_model_from_scratch_claims_no_origin(trainer):
    card = card_of(trainer)
    assert "trained from scratch" in card.text and "Data: not recorded." in card.text
    assert card.data.base_model is card.data.license is card.data.datasets is card.data.eval_results is None


def test_results_are_those_of_the_training(trainer):
    trainer.train()
    card = card_of(trainer, dataset="Small zoo", dataset_tags="me/zoo", license="mit", tags="animals")
    accuracy = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", accuracy, "me/zoo")
    assert (card.data.license, card.data.datasets) == ("mit", ["me/zoo"]) and "animals" in card.data.tags
    assert f"Accuracy: {accuracy}" in card.text and "| Step |" in card.text and "learning_rate: 5e-05" in card.text


def test_origins_are_looked_up(trainer, tmp_path):
    config, folder = trainer.model.config, tmp_path / "checkpoint"
    config._name_or_path = "me/crossvit_15"  # as `from_pretrained` leaves it
    assert card_of(trainer).data.base_model == "me/crossvit_15"

    # The stock Trainer calls a model that was loaded from a folder trained from scratch
    folder.mkdir()
    config._name_or_path = str(folder)
    card = card_of(trainer)
    assert card.data.base_model is None and "not recorded" in card.text
    assert "from scratch" not in card.text and str(tmp_path) not in str(card)
    (folder / "README.md").write_text("---\nbase_model: timm/crossvit_15_240.in1k\n---\n")
    card = card_of(trainer)
    assert card.data.base_model == "timm/crossvit_15_240.in1k" and "timm/crossvit_15_240.in1k" in card.text
    assert card_of(trainer, finetuned_from="me/other").data.base_model == "me/other"


def test_code_in_the_repository_shows_in_the_usage(trainer):
    assert "trust_remote_code" not in card_of(trainer).text
    trainer.model.config.auto_map = {"AutoConfig": "configuration_crossvit.CrossViTConfig"}
    assert 'model="tuned", trust_remote_code=True' in card_of(trainer).text


def test_adapters_keep_their_own_card(small_config, tmp_path):
    model = get_peft_model(CrossViTForImageClassification(small_config), LoraConfig(target_modules=["qkv"]))
    trainer = CrossViTTrainer(model, TrainingArguments(tmp_path / "tuned", report_to="none", use_cpu=True))
    trainer.save_model()
    trainer.create_model_card()
    assert ModelCard.load(tmp_path / "tuned" / "README.md").data.library_name == "peft"
