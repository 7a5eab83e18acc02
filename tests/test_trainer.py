"""What the card of a fine-tuned model says is what is known."""

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments

from crossvit import CrossViTForImageClassification
from crossvit.training.trainer import CrossViTTrainer


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


@pytest.mark.parametrize("kind", ["classes", "probabilities", "many labels", "numbers"])
def test_accumulated_batches_train_as_one(small_config, tmp_path, kind):
    """Also where the last one is short. 6e-8 was measured."""
    small_config.problem_type = {"many labels": "multi_label_classification", "numbers": "regression"}.get(
        kind, "single_label_classification"
    )
    labels = {
        "classes": torch.arange(7) % 5,
        "probabilities": torch.rand(7, 5).softmax(dim=-1),
        "many labels": (torch.rand(7, 5) > 0.5).float(),
        "numbers": torch.randn(7, 5),
    }[kind]
    images = [{"pixel_values": torch.randn(3, 36, 36), "labels": label} for label in labels]
    start = CrossViTForImageClassification(small_config).state_dict()
    weights = []
    for batch_size, accumulated in ((7, 1), (2, 4)):
        model = CrossViTForImageClassification(small_config)
        model.load_state_dict(start)
        arguments = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulated,
            optim="sgd", learning_rate=0.1, label_smoothing_factor=0.1, report_to="none", use_cpu=True,
            save_strategy="no", max_grad_norm=0,
        )  # fmt: skip
        trainer = CrossViTTrainer(model, arguments, train_dataset=images)
        trainer.train()
        weights.append(model.state_dict())

    # By hand, from the definition of each loss
    model = CrossViTForImageClassification(small_config).train()
    model.load_state_dict(start)
    logits = model(torch.stack([image["pixel_values"] for image in images])).logits
    loss = {
        "classes": lambda: -(0.9 * logits.log_softmax(-1)[range(7), labels] + 0.1 * logits.log_softmax(-1).mean(-1)),
        "probabilities": lambda: -((0.9 * labels + 0.02) * logits.log_softmax(-1)).sum(-1),
        "many labels": lambda: -(labels * logits.sigmoid().log() + (1 - labels) * (1 - logits.sigmoid()).log()),
        "numbers": lambda: (logits - labels) ** 2,
    }[kind]()
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        expected = parameter - 0.1 * parameter.grad
        for found in weights:
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)


def test_several_gpus_of_one_process_have_one_loss(trainer, monkeypatch):
    """`DataParallel` brings all logits together; the Trainer then multiplies the loss by the number of GPUs."""
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    loss = trainer.classification_loss({"logits": logits}, labels, torch.tensor(6).unsqueeze(0).expand(2, -1))
    torch.testing.assert_close(2 * loss, torch.nn.functional.cross_entropy(logits, labels))


def test_a_disk_that_is_too_small_is_noticed(trainer, monkeypatch):
    usage = type("Usage", (), {"free": 3 * trainer.checkpoint_size() - 1})
    trainer.args.save_total_limit = 2
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="the checkpoints need") as caught:
        trainer.train()
    assert caught.value.filename == str(trainer.args.output_dir) and trainer.state.global_step == 0

    usage.free += 1

    def fill_disk(*args):
        usage.free = 0
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    trainer._save_optimizer_and_scheduler = fill_disk
    with pytest.raises(OSError, match=r"the disk is full at step 2, what was saved before is whole \(Pytorch"):
        trainer.train()


def test_the_average_is_what_is_evaluated_and_saved(small_config, tmp_path):
    images = [{"pixel_values": torch.randn(3, 36, 36), "labels": index % 5} for index in range(8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, save_steps=1, eval_strategy="steps", eval_steps=1, learning_rate=1e-2, use_cpu=True,
        report_to="none", per_device_train_batch_size=8, lr_scheduler_type="constant",
    )  # fmt: skip
    model = CrossViTForImageClassification(small_config)
    weights = [{name: parameter.detach().clone() for name, parameter in model.named_parameters()}]

    class Recorder(TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    trainer = CrossViTTrainer(
        model, arguments, train_dataset=images, eval_dataset=images, average_decay=0.5, callbacks=[Recorder()]
    )
    trainer.train()
    average = weights[0]
    for step in range(1, 4):
        decay = min(0.5, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * weights[step][name] for name, value in average.items()}
        saved = CrossViTForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}").eval()
        for name, parameter in saved.named_parameters():
            torch.testing.assert_close(parameter, average[name], atol=1e-6, rtol=1e-5)
        batch = torch.stack([image["pixel_values"] for image in images])
        with torch.no_grad():
            loss = saved(batch, labels=torch.arange(8) % 5).loss.item()
        (logged,) = [e["eval_loss"] for e in trainer.state.log_history if e["step"] == step and "eval_loss" in e]
        assert logged == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name], atol=1e-6, rtol=1e-5)
