"""Grad-CAM on CrossViT against its definition, and tokens as maps."""

import numpy as np
import PIL.Image
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timm_reference import perturb

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.interpretability import CropRegion, LogitsModel, TokensToMaps


@pytest.fixture
def model(small_config) -> CrossViTForImageClassification:
    return perturb(CrossViTForImageClassification(small_config)).eval()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 36, 36, generator=torch.Generator().manual_seed(0))


def last_norms(model) -> list[torch.nn.Module]:
    return [branch.layers[-1].layernorm_before for branch in model.crossvit.stages[-1].branches]


def grad_cam_by_hand(model, layer, grid, pixel_values, label) -> torch.Tensor:
    """Selvaraju et al. 2017, equations 1 and 2: (batch, rows, columns)"""
    kept = {}
    handle = layer.register_forward_hook(lambda module, args, output: kept.update(tokens=output))
    score = model(pixel_values).logits[:, label].sum()
    handle.remove()
    (gradients,) = torch.autograd.grad(score, kept["tokens"])
    maps, gradients = (
        tensor[:, 1:].transpose(1, 2).reshape(len(tensor), -1, *grid) for tensor in (kept["tokens"], gradients)
    )
    return torch.relu((gradients.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1)).detach()


@pytest.mark.parametrize("branch, grid", [(0, (6, 6)), (1, (4, 4))])
def test_grad_cam_follows_the_formula_of_its_paper(model, pixel_values, branch, grid):
    layer = last_norms(model)[branch]
    with GradCAM(LogitsModel(model), [layer], reshape_transform=TokensToMaps(model)) as grad_cam:
        heat = grad_cam(pixel_values, targets=[ClassifierOutputTarget(3)] * 2)
    assert heat.shape == (2, 36, 36)
    expected = grad_cam_by_hand(model, layer, grid, pixel_values, 3)
    # The package scales each map to 0 ... 1 and resizes it bilinearly with OpenCV
    expected = (expected - expected.amin((1, 2), keepdim=True)) / expected.amax((1, 2), keepdim=True)
    expected = torch.nn.functional.interpolate(expected[:, None], (36, 36), mode="bilinear")[:, 0].numpy()
    expected -= expected.min(axis=(1, 2), keepdims=True)
    expected /= expected.max(axis=(1, 2), keepdims=True)
    assert np.abs(heat - expected).max() < 1e-5  # 5e-7 were measured


def test_grad_cam_of_both_branches_and_any_resolution(model):
    pixel_values = torch.randn(1, 3, 48, 60, generator=torch.Generator().manual_seed(0))
    maps = TokensToMaps(model, image_size=(48, 60))

    class Interpolating(LogitsModel):
        def forward(self, pixel_values):
            return super().forward(pixel_values, interpolate_pos_encoding=True)

    with GradCAM(Interpolating(model), last_norms(model), reshape_transform=maps) as grad_cam:
        heat = grad_cam(pixel_values, targets=None)
    assert heat.shape == (1, 48, 60) and np.isfinite(heat).all() and heat.max() > heat.min()
    # Like a map of patches, one of the pixels of the model is resampled to the image
    image, processor = PIL.Image.new("RGB", (90, 70)), CrossViTImageProcessor(do_center_crop=False, do_resize=False)
    crop = CropRegion.from_image(processor, image)
    assert crop.align(heat[0]).shape == (70, 90)


def test_tokens_become_maps_in_the_order_of_the_image(model):
    to_maps = TokensToMaps(model)
    for branch, (rows, columns) in enumerate(((6, 6), (4, 4))):
        tokens = torch.randn(2, 1 + rows * columns, model.config.embed_dim[branch])
        maps = to_maps(tokens)
        assert maps.shape == (2, model.config.embed_dim[branch], rows, columns)
        assert torch.equal(maps[1, :, 2, 3], tokens[1, 1 + 2 * columns + 3])


def test_tokens_that_are_not_of_one_branch_are_refused(model):
    to_maps = TokensToMaps(model)
    for shape in ((2, 36, 24), (2, 37, 32), (2, 24), (2, 1, 24)):
        with pytest.raises(ValueError, match=r"\(37, 24\), \(17, 32\)"):
            to_maps(torch.zeros(shape))
    # Two branches of the same width and number of patches, but not the same grid
    config = CrossViTConfig(
        image_size=((24, 96), (48, 48)), patch_size=(12, 12), embed_dim=(24, 24), num_heads=(2, 2), depth=((1, 1, 0),)
    )
    with pytest.raises(ValueError, match="not those of one branch"):
        TokensToMaps(CrossViTForImageClassification(config))(torch.zeros(1, 17, 24))
