"""The attention implementations that importing the package registers."""

import pytest
import torch
from timm_reference import perturb

from crossvit import CrossViTForImageClassification, attention
from crossvit.attention import blockwise_attention_forward


def module(training: bool = False) -> torch.nn.Module:
    module = torch.nn.Module()
    module.is_causal = False
    return module.train(training)


@pytest.mark.parametrize("images_per_block", [1, 2, 5, 100])
def test_blocks_change_neither_the_output_nor_gradients(monkeypatch, images_per_block):
    monkeypatch.setattr(attention, "BLOCK_BYTES", images_per_block * 2 * 7 * 7 * 4)
    states = torch.randn(3, 5, 2, 7, 4, requires_grad=True).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(*states, scale=0.3).transpose(1, 2)
    output, weights = blockwise_attention_forward(module(), *states, None, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), states)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), states))


def test_weights_are_dropped_in_training():
    ones = torch.ones(1, 1, 256, 256)
    output, _ = blockwise_attention_forward(module(training=True), ones[:, :, :8], ones, ones, None, dropout=0.5)
    # Means of 256 weights, half of them dropped and the others doubled: 1 with a standard deviation of 1/16
    assert 0.7 < output.mean() < 1.3 and (output - 1).abs().max() > 1e-2
    output, _ = blockwise_attention_forward(module(), ones[:, :, :8], ones, ones, None, dropout=0.5)
    torch.testing.assert_close(output, torch.ones_like(output))


@torch.no_grad()
def test_model_in_bfloat16_attends_blockwise_where_asked_to(small_config, monkeypatch):
    model = perturb(CrossViTForImageClassification(small_config)).eval()
    pixel_values = torch.randn(3, 3, 36, 36)
    expected = model(pixel_values).logits
    model.bfloat16().set_attn_implementation("blockwise")
    splits = []
    split = torch.Tensor.split
    monkeypatch.setattr(
        torch.Tensor, "split", lambda states, *args: splits.append(states.dtype) or split(states, *args)
    )
    logits = model.crossvit(pixel_values).pooler_output
    monkeypatch.undo()
    assert splits == [torch.bfloat16] * 3 * 6  # queries, keys and values of six layers
    logits = model(pixel_values).logits
    torch.testing.assert_close(logits.float(), expected, atol=5e-2, rtol=0)  # 1.2e-2 was measured, of logits up to 2


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("compiler", ["export", "jit"])
def test_traced_programs_take_any_batch(small_config, compiler, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_BYTES", 1)  # as many blocks as images
    small_config.depth = ((1, 1, 0),)
    model = perturb(CrossViTForImageClassification(small_config)).eval()
    model.set_attn_implementation("blockwise")
    pixel_values = torch.randn(2, 3, 36, 36)
    if compiler == "export":
        batch = torch.export.Dim("batch", max=4096)
        program = torch.export.export(model, (pixel_values,), dynamic_shapes=({0: batch},)).module()
    else:
        program = torch.jit.trace(model, pixel_values, strict=False)
    for batch_size in (1, 2, 7):
        pixel_values = torch.randn(batch_size, 3, 36, 36)
        torch.testing.assert_close(program(pixel_values)["logits"], model(pixel_values).logits, atol=1e-5, rtol=0)
