"""
Training does the same to a CrossViT and to timm's in Transformers' timm wrapper.

Both start from the same weights and see the same digits in the same order, in double precision: in single precision
they would differ by rounding, which training amplifies.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from small_training import arguments
from timm_reference import our_state_dict
from torch.utils.data import StackDataset
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer

from crossvit import CrossViTConfig, CrossViTForImageClassification


# The branches differ in every number, their image sizes (16 and 12) too
SHARED = {
    "patch_size": (4, 6),
    "embed_dim": (32, 48),
    "depth": ((1, 2, 0), (2, 2, 0)),
    "num_heads": (2, 4),
    "mlp_ratio": (2.0, 3.0),
}
TIMM = {**SHARED, "img_size": 16, "img_scale": (1.0, 0.75), "in_chans": 1}
OURS = {**SHARED, "image_size": (16, 12), "num_channels": 1}


def losses_of_training(model, folder) -> np.ndarray:
    """Of each step, among digits of 16x16 pixels."""
    images, labels = load_digits(return_X_y=True)
    pixel_values = torch.tensor(images, dtype=torch.float64).reshape(-1, 1, 8, 8) / 8 - 1
    pixel_values = torch.nn.functional.interpolate(pixel_values, (16, 16), mode="bilinear")
    args = arguments(
        folder, max_steps=30, per_device_train_batch_size=32, learning_rate=2e-3, lr_scheduler_type="cosine",
        warmup_steps=5, weight_decay=0.05, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    digits = StackDataset(pixel_values=pixel_values, labels=torch.tensor(labels))
    trainer = Trainer(model.double(), args, train_dataset=digits)
    trainer.train()
    return np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_training_gives_the_weights_of_the_timm_wrapper(tmp_path):
    config = TimmWrapperConfig(architecture="crossvit_9_240", model_args=TIMM, num_labels=10)
    wrapper = TimmWrapperForImageClassification(config)
    for parameter in wrapper.parameters():
        if parameter.dim() == 2:
            torch.nn.init.trunc_normal_(parameter, std=0.15)  # so narrow layers hardly begin to learn from 0.02
    model = CrossViTForImageClassification(CrossViTConfig(**OURS, num_labels=10))
    model.load_state_dict(our_state_dict(wrapper.timm_model))

    expected, losses = (losses_of_training(each, tmp_path) for each in (wrapper, model))
    # The Trainer adds up in float32, which resolves 2.4e-7 here: no difference was measured
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-6)
    assert losses[-1] < losses[0] - 0.2

    weights = model.state_dict()
    for name, weight in our_state_dict(wrapper.timm_model).items():
        # 8e-13 was measured, after steps of up to 2e-3
        torch.testing.assert_close(weights[name], weight, atol=1e-9, rtol=0, msg=name)
