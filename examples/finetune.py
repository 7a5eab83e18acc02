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
"""Fine-tunes a CrossViT on your own images, from a folder, a saved dataset or the Hub, or trains one from scratch.

    python examples/finetune.py --model timm/crossvit_15_240.in1k --data photos --output_dir outputs/photos

The same command resumes an interrupted run. Options of Transformers' TrainingArguments work too:

    --bf16 --gradient_checkpointing --gradient_accumulation_steps 4 --torch_compile --push_to_hub
    torchrun --nproc_per_node 8 examples/finetune.py ...      # distributed

Columns of the data may hold a separate image for each branch, and masks of the objects to attend to:

    --image_columns photo infrared --mask_column mask --mask_weight 0.1

--lora_rank saves the merged model as usual, and the adapter with the new heads beside it. To load the adapter:

    model = CrossViTForImageClassification.from_pretrained("base", num_labels=3, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(model, "outputs/photos/adapter")
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common.command_line import load_checkpoint, load_config, make_parser, parse, run_command
from common.errors import CommandError
from common.labelled_images import DataArguments, LabelledImages
from common.workflow import TRAINING_DEFAULTS, make_trainer, prepare_images, save_and_evaluate, train
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from crossvit import CrossViTForImageClassification
from crossvit.training.augmentation import AugmentationArguments
from crossvit.training.image_sizes import set_image_size


DEFAULTS = {
    "output_dir": "outputs/finetune",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 5e-5,
    "weight_decay": 0.05,
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "lr_scheduler_type": "cosine",
}


@dataclass
class ModelArguments:
    """Which model to train, and how much of it."""

    model: str | None = field(
        default=None, metadata={"help": "CrossViT checkpoint to fine-tune, timm's too (folder or Hub ID)."}
    )
    config: str | None = field(
        default=None, metadata={"help": "Config to train from scratch, instead of --model (folder, file or Hub ID)."}
    )
    image_size: str | None = field(
        default=None, metadata={"help": "Native image size in pixels, 224 or 256x128 (height x width)."}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Train only adapters of this rank (LoRA) and the heads; 0: all weights."}
    )
    drop_path_rate: float | None = field(default=None, metadata={"help": "Stochastic depth; default: the model's."})
    layer_decay: float | None = field(
        default=None,
        metadata={"help": "Layer-wise learning rate decay, such as 0.75: factor per stage, from the heads downwards."},
    )

    def __post_init__(self):
        if (self.model is None) == (self.config is None):
            raise ValueError("give --model, a CrossViT to fine-tune, or --config, one to train from scratch")
        sides = (self.image_size or "1").lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ValueError(f"--image_size {self.image_size}: give pixels as 224 or, height first, as 256x128")
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank {self.lora_rank}: must be 0 or more")


@dataclass
class GuidanceArguments:
    """Guided attention."""

    mask_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of masks: images, white where the object is. Their overlap with attention is reported."
        },
    )
    mask_weight: float = field(default=0.0, metadata={"help": "Weight of the guided-attention loss, such as 0.1."})

    def __post_init__(self):
        if not self.mask_weight >= 0:
            raise ValueError(f"--mask_weight {self.mask_weight}: must be 0 or more")
        if self.mask_weight and not self.mask_column:
            raise ValueError(f"--mask_weight {self.mask_weight}: needs --mask_column, the column of the masks")


def make_model(args: ModelArguments, images: LabelledImages, pretrained: Any, config: Any, processor: Any) -> Any:
    """The model for the classes of the images, of the size that was asked for."""
    names = dict(enumerate(images.class_names))
    if pretrained is not None and config.id2label == names:
        model: Any = pretrained
    else:  # new heads for new classes
        config = copy.deepcopy(config)
        config.id2label, config.label2id = names, {name: index for index, name in names.items()}
        model = CrossViTForImageClassification(config)
        if pretrained is not None:  # only its weights: its encoder would bring a second configuration
            model.crossvit.load_state_dict(pretrained.crossvit.state_dict(), assign=True)
    model.config.problem_type = f"{'multi' if images.multi_label else 'single'}_label_classification"
    if args.image_size:
        sides = [int(side) for side in args.image_size.lower().split("x")]
        set_image_size(model, processor, sides[0], sides[-1])
        sizes = (f"{height}x{width}" for height, width in model.config.image_sizes)
        print(f"Image sizes of the branches, in pixels: {', '.join(sizes)}")
    if args.lora_rank:
        layers = ["qkv", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
        lora: Any = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank, "target_modules": layers}
        model = get_peft_model(model, LoraConfig(**lora, modules_to_save=["classifier"]))
    return model


def main() -> None:
    groups: Any = [ModelArguments, DataArguments, AugmentationArguments, GuidanceArguments, TrainingArguments]
    parser = make_parser(groups, __doc__, TRAINING_DEFAULTS | DEFAULTS)
    model_args, data, augmentation, guidance, args = parse(parser)
    options = {} if model_args.drop_path_rate is None else {"drop_path_rate": model_args.drop_path_rate}
    pretrained = None
    if model_args.model:
        # In single precision, whatever it was saved in: --bf16 computes in half precision and learns in single
        pretrained, processor = load_checkpoint(model_args.model, dtype=torch.float32, **options)
        config = pretrained.config
    else:
        config, processor = load_config(model_args.config, **options)

    images = prepare_images(data, args, guidance.mask_column)
    model = make_model(model_args, images, pretrained, config, processor)
    trainer = make_trainer(
        model, processor, images, data, augmentation, args, guidance.mask_weight, layer_decay=model_args.layer_decay
    )
    if model_args.lora_rank and trainer.is_fsdp_enabled:
        raise CommandError("--lora_rank: adapters are too small for FSDP; use one of them")
    train(trainer, images)
    if model_args.lora_rank:
        if args.should_save:  # with the classes and the image size that it is for
            adapter = Path(args.output_dir) / "adapter"
            model.save_pretrained(adapter)
            model.get_base_model().config.save_pretrained(adapter)
            processor.save_pretrained(adapter)
        trainer.model = trainer.model_wrapped = model.merge_and_unload()
    save_and_evaluate(trainer, images, data)


if __name__ == "__main__":
    run_command(main)
