"""Attention rollout in torch, and its overlap with masks."""

import copy
from itertools import accumulate

import pytest
import torch
from attention_weights import ARCHITECTURES, change, make_model, record_weights

from crossvit import CrossViTConfig, CrossViTForImageClassification
from crossvit.interpretability import attention_iou, attention_rollout


@pytest.fixture(params=ARCHITECTURES)
def config(request, small_config) -> CrossViTConfig:
    return change(small_config, **ARCHITECTURES[request.param])


@pytest.fixture
def model(small_config) -> CrossViTForImageClassification:
    return make_model(small_config)


def multiply_joint_matrices(weights: dict[str, torch.Tensor], config: CrossViTConfig) -> list[torch.Tensor]:
    """
    Rollout by its definition, in float64: the product of a matrix over the tokens of all branches for each layer.

    Returns:
        For each branch (batch, branches, 1 + patches), the shares of its tokens in the class token of every branch.
    """
    counts = [
        1 + (height // patch_size) * (width // patch_size)
        for (height, width), patch_size in zip(config.image_sizes, config.patch_size)
    ]
    tokens = [slice(end - count, end) for count, end in zip(counts, accumulate(counts))]
    class_tokens = [branch.start for branch in tokens]
    batch_size = len(next(iter(weights.values())))
    identity = torch.eye(sum(counts), dtype=torch.float64).repeat(batch_size, 1, 1)
    product = identity
    for stage, (*depths, _) in enumerate(config.depth):
        for branch, depth in enumerate(depths):
            block = (slice(None), tokens[branch], tokens[branch])
            for layer in range(depth):
                attention = weights[f"crossvit.stages.{stage}.branches.{branch}.layers.{layer}.attention"]
                matrix = identity.clone()
                matrix[block] = (identity[block] + attention.double().mean(dim=1)) / 2
                product = matrix @ product
        matrix = identity.clone()
        for branch, class_token in enumerate(class_tokens):
            row = weights[f"crossvit.stages.{stage}.fusions.{branch}.layers.0.attention"].double().mean(dim=1)[:, 0]
            next_tokens = tokens[(branch + 1) % len(tokens)]
            matrix[:, class_token, class_token] = (1 + row[:, 0]) / 2
            matrix[:, class_token, next_tokens.start + 1 : next_tokens.stop] = row[:, 1:] / 2
        product = matrix @ product
    return [product[:, class_tokens, branch] for branch in tokens]


@pytest.mark.parametrize("image_per_branch", [False, True])
def test_rollout_is_the_product_of_joint_matrices_with_the_same_gradients(config, image_per_branch):
    model = make_model(config)
    shape = (3, config.num_branches, 3, 36, 36) if image_per_branch else (3, 3, 36, 36)
    pixel_values = torch.randn(shape, requires_grad=True)
    outputs, weights = record_weights(model, pixel_values)
    product = multiply_joint_matrices(weights, config)
    for branch in (None, *range(-1, config.num_branches)):
        rollout = attention_rollout(outputs, config, branch)
        expected = [shares.mean(dim=1) if branch is None else shares[:, branch] for shares in product]
        for shares, expected_shares in zip(rollout, expected, strict=True):
            assert shares.dtype == torch.float32
            # 3.6e-7 of a share was measured, as float32 rounds
            torch.testing.assert_close(shares.double(), expected_shares, rtol=1e-6, atol=0)
        sums = torch.cat(rollout, dim=1).sum(dim=1)
        torch.testing.assert_close(sums, torch.ones(3), rtol=0, atol=1e-6)  # 1.2e-7 was measured

        # Of a random linear function, since the sum is constant
        factors = [torch.randn_like(shares) for shares in rollout]
        gradient, expected_gradient = (
            torch.autograd.grad(
                sum((factor * shares).sum() for factor, shares in zip(factors, result)),
                pixel_values,
                retain_graph=True,
            )[0]
            for result in (rollout, expected)
        )
        scale = expected_gradient.abs().max()
        assert scale > 0
        # 3.4e-7 of the largest gradient was measured
        torch.testing.assert_close(gradient / scale, expected_gradient / scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_gradients_in_bfloat16_with_gradient_checkpointing(config, precision):
    pixel_values, masks = torch.randn(2, 3, 36, 36), torch.rand(2, 36, 36)
    original = make_model(config).train().to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(original)
        if checkpointing:
            # Earlier releases of transformers have only the second name
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            outputs, weights = record_weights(model, pixel_values)
            rollout = attention_rollout(outputs, config)
            (1 - attention_iou(rollout, masks, config)).sum().backward()
        assert outputs.attentions[0].dtype == torch.bfloat16
        for shares, expected in zip(rollout, multiply_joint_matrices(weights, config), strict=True):
            # Only the attention weights are rounded to bfloat16: as above
            torch.testing.assert_close(shares.double(), expected.mean(dim=1), rtol=1e-6, atol=0)
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    for gradient in gradients:
        assert all(values.isfinite().all() for values in gradient.values())
        queries_and_keys = [
            name for name in gradient if name.endswith(("qkv.weight", "layers.0.attention.q_proj.weight"))
        ]
        num_layers = sum(sum(depths) for *depths, _ in config.depth)
        assert len(queries_and_keys) == num_layers + len(config.depth) * config.num_branches
        assert all(gradient[name].any() for name in queries_and_keys)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_compiled_model_has_the_same_rollout_and_gradients(small_config):
    model = make_model(change(small_config, depth=((1, 1, 0),)))
    compiled = torch.compile(model, backend="eager")
    pixel_values = torch.randn(2, 3, 36, 36, requires_grad=True)
    results = []
    for run in (model, compiled):
        rollout = attention_rollout(run(pixel_values, output_attentions=True), model.config)
        loss = sum(shares.square().sum() for shares in rollout)
        results.append((rollout, *torch.autograd.grad(loss, pixel_values)))
    torch.testing.assert_close(results[1], results[0])


def test_outputs_without_weights_are_refused(model):
    pixel_values = torch.randn(1, 3, 36, 36)
    for options in ({}, {"output_attentions": True, "return_dict": False}):
        with pytest.raises(ValueError, match=r"without them.*'eager'"):
            attention_rollout(model(pixel_values, **options), model.config)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="got a CrossViTImageClassifierOutput without them"):
        attention_rollout(model(pixel_values, output_attentions=True), model.config)


@pytest.mark.parametrize("branch", [2, -3])
def test_branch_out_of_range_is_named(model, branch):
    outputs = model(torch.randn(1, 3, 36, 36), output_attentions=True)
    with pytest.raises(ValueError, match=f"`branch={branch}` is out of range: there are 2,"):
        attention_rollout(outputs, model.config, branch)


# Of branches with 6 x 4 and 4 x 6 patches: the left half of both is whole patches
GRID_SIZES = ((6, 4), (4, 6))


@pytest.fixture
def grid_config(small_config) -> CrossViTConfig:
    return change(small_config, image_size=((36, 24), (32, 48)))


def spread_evenly(*parts: str) -> tuple[torch.Tensor, ...]:
    """Rollout of two images in which the patches of that part of each branch have equal shares."""
    rollout = []
    for part, (rows, columns) in zip(parts, GRID_SIZES):
        grid = torch.zeros(2, rows, columns)
        if part != "right":
            grid[..., : columns // 2] = 0.6 / (rows * columns)
        if part != "left":
            grid[..., columns // 2 :] = 0.6 / (rows * columns)
        rollout.append(torch.cat((torch.full((2, 1), 0.2), grid.flatten(1)), dim=1))
    return tuple(rollout)


@pytest.mark.parametrize("size", [(36, 24), (12, 12), (6, 4), (96, 480)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_overlap_is_known_for_even_attention(grid_config, size, dtype):
    left = torch.zeros(2, *size, dtype=dtype)
    left[..., : size[1] // 2] = 1
    for parts, expected in (
        (("left", "left"), 1),
        (("right", "right"), 0),
        (("left", "right"), 1 / 2),  # the mean over the branches
        (("all", "all"), 1 / 2),  # the half of the union
        (("right", "all"), 1 / 4),
    ):
        overlap = attention_iou(spread_evenly(*parts), left, grid_config)
        torch.testing.assert_close(overlap, torch.full((2,), expected, dtype=torch.float32))


def test_overlap_is_that_of_each_image(grid_config):
    left = torch.zeros(36, 24)
    left[:, :12] = 1
    masks = torch.stack((left, 1 - left))
    torch.testing.assert_close(
        attention_iou(spread_evenly("left", "left"), masks, grid_config), torch.tensor([1.0, 0.0])
    )
    # a = 1 and m = 1/4 in every patch: 1/4 of 1 + 1/4 - 1/4
    masks = torch.full((2, 36, 24), 0.25)
    torch.testing.assert_close(
        attention_iou(spread_evenly("all", "all"), masks, grid_config), torch.tensor([0.25, 0.25])
    )


def test_empty_masks_and_branches_without_attention_have_finite_gradients(small_config):
    three_branches = ARCHITECTURES["three branches, two cross-attention layers"]
    config = change(small_config, **{**three_branches, "depth": ((1, 1, 1, 0),)})
    model = make_model(config)
    pixel_values = torch.randn(2, 3, 36, 36, requires_grad=True)
    rollout = attention_rollout(model(pixel_values, output_attentions=True), config, branch=0)
    assert not rollout[2].any()
    masks = torch.zeros(2, 36, 36)
    masks[1] = 1
    overlap = attention_iou(rollout, masks, config)
    assert overlap[0] == 0 and 0 < overlap[1] < 1
    (gradient,) = torch.autograd.grad(overlap.sum(), pixel_values)
    assert not gradient[0].any() and gradient[1].isfinite().all() and gradient[1].any()


@pytest.mark.parametrize("shape", [(3, 36, 24), (2, 1, 36, 24), (36, 24)])
def test_masks_of_another_shape_are_refused(grid_config, shape):
    with pytest.raises(ValueError, match=r"of shape \(2, height, width\), one per image, got \(" + str(shape[0])):
        attention_iou(spread_evenly("all", "all"), torch.ones(shape), grid_config)


def test_overlap_with_interpolated_position_embeddings_is_refused(model):
    outputs = model(torch.randn(1, 3, 48, 48), interpolate_pos_encoding=True, output_attentions=True)
    rollout = attention_rollout(outputs, model.config)
    with pytest.raises(ValueError, match="has 64 patches where images of the native size have 6 x 6"):
        attention_iou(rollout, torch.ones(1, 48, 48), model.config)
