import copy
import re

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from huggingface_hub.errors import StrictDataclassError
from timm_reference import perturb
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import OutputRecorder

from crossvit import (
    CrossViTBackbone,
    CrossViTConfig,
    CrossViTForImageClassification,
    CrossViTModel,
)
from crossvit.modeling_crossvit import CrossViTCrossAttention, CrossViTSelfAttention


@pytest.fixture
def model(small_config) -> CrossViTForImageClassification:
    return perturb(CrossViTForImageClassification(small_config)).eval()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 36, 36)


# Outputs


@torch.no_grad()
def test_outputs_are_those_of_the_documentation(model, pixel_values):
    model.set_attn_implementation("eager")
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    patches, widths, heads = (36, 16), (24, 32), (2, 4)

    assert outputs.logits.shape == (3, 5)
    torch.testing.assert_close(outputs.logits, outputs.branch_logits.mean(dim=1))
    assert outputs.loss is None

    shapes = [tuple(state.shape) for state in outputs.hidden_states]
    assert shapes == [(3, 1 + patches[b], widths[b]) for _ in range(3) for b in (0, 1)]
    # ((1, 2, 0), (2, 1, 0)): stage, branch, layer
    shapes = [tuple(attention.shape) for attention in outputs.attentions]
    assert shapes == [(3, heads[b], 1 + patches[b], 1 + patches[b]) for b in (0, 1, 1, 0, 0, 1)]
    shapes = [tuple(attention.shape) for attention in outputs.cross_attentions]
    assert shapes == [(3, heads[b], 1, 1 + patches[b]) for b in (1, 0, 1, 0)]
    for attention in (*outputs.attentions, *outputs.cross_attentions):
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))

    base = model.crossvit(pixel_values)
    assert base.hidden_states is None and base.attentions is None and base.cross_attentions is None
    assert base.last_hidden_state.shape == (3, 17, 32)
    torch.testing.assert_close(base.last_hidden_state, model.crossvit.layernorms[1](outputs.hidden_states[-1]))
    torch.testing.assert_close(base.pooler_output[:, 24:], base.last_hidden_state[:, 0])
    torch.testing.assert_close(
        base.pooler_output[:, :24], model.crossvit.layernorms[0](outputs.hidden_states[-2])[:, 0]
    )


@torch.no_grad()
def test_tuples_instead_of_outputs(model, pixel_values):
    expected = model(pixel_values)
    logits, branch_logits = model(pixel_values, return_dict=False)
    assert torch.equal(logits, expected.logits) and torch.equal(branch_logits, expected.branch_logits)
    model.config.return_dict = False
    assert torch.equal(model(pixel_values)[0], expected.logits)
    hidden_states = model.crossvit(pixel_values, output_hidden_states=True)[2]
    assert [state.shape[1] for state in hidden_states] == [37, 17] * 3


@torch.no_grad()
@pytest.mark.skipif(
    not hasattr(OutputRecorder, "num_hidden_layers_key"), reason="this transformers cannot select hidden states"
)
def test_selected_hidden_states(model, pixel_values):
    every = model(pixel_values, output_hidden_states=True).hidden_states
    some = model(pixel_values, output_hidden_states=[1, -2]).hidden_states
    assert [index for index, state in enumerate(some) if state is not None] == [1, 4]
    assert torch.equal(some[1], every[1]) and torch.equal(some[4], every[4])


# Resolution


@torch.no_grad()
def test_interpolated_positions_change_nothing_at_the_native_size(model, pixel_values):
    assert torch.equal(model(pixel_values).logits, model(pixel_values, interpolate_pos_encoding=True).logits)
    config = CrossViTConfig(
        image_size=(40, 30), patch_size=(12, 16), embed_dim=(24, 32), num_heads=(2, 4), depth=((1, 1, 0),)
    )
    model = CrossViTModel(config).eval()  # not whole patches: as ViT, it leaves out the rest
    pixel_values = torch.randn(1, 3, 40, 40)
    outputs = model(pixel_values, output_hidden_states=True)
    assert [tokens.shape[1] for tokens in outputs.hidden_states] == [10, 2, 10, 2]
    interpolated = model(pixel_values, interpolate_pos_encoding=True)
    assert torch.equal(interpolated.last_hidden_state, outputs.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize(
    "size, grids",
    [
        ((36, 72), ((6, 12), (4, 8))),
        ((72, 36), ((12, 6), (8, 4))),
        ((54, 18), ((9, 3), (6, 2))),
        ((37, 50), ((6, 8), (4, 6))),  # 37 * 32 / 36 / 8 = 4.1, 50 / 6 = 8.3, 50 * 32 / 36 / 8 = 5.6
        ((1, 1), ((1, 1), (1, 1))),
        ((3, 200), ((1, 33), (1, 22))),  # half a patch counts as one
    ],
)
def test_interpolated_positions_keep_the_resolution(model, size, grids):
    outputs = model(torch.randn(2, 3, *size), interpolate_pos_encoding=True, output_hidden_states=True)
    assert [tokens.shape[1] - 1 for tokens in outputs.hidden_states] == [
        rows * columns for _ in range(3) for rows, columns in grids
    ]
    assert outputs.logits.isfinite().all()


@torch.no_grad()
def test_interpolation_keeps_rows_rows_and_the_class_position(small_config):
    small_config.image_size = ((36, 72), (32, 64))
    embeddings = CrossViTModel(small_config).embeddings[0]
    rows = torch.arange(6.0).repeat_interleave(12)
    embeddings.position_embeddings[0, 1:] = rows[:, None]
    positions = embeddings.interpolate_pos_encoding((12, 5))
    assert torch.equal(positions[:, :1], embeddings.position_embeddings[:, :1])
    grid = positions[0, 1:, 0].unflatten(0, (12, 5))
    torch.testing.assert_close(grid, grid[:, :1].expand(12, 5))  # along a row nothing changes
    assert (grid[1:, 0] > grid[:-1, 0]).all()
    # Between the borders a linear function stays one, up to the 0.047 by which PyTorch's cubic (a = -0.75) bends it
    torch.testing.assert_close(grid[4:8, 0], (torch.arange(4.0, 8.0) + 0.5) / 2 - 0.5, atol=0.05, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("image_size", [(72, 64), ((36, 72), (32, 64)), ((54, 30), 48), 96])
def test_resized_model_saves_and_loads(model, image_size, tmp_path):
    before = copy.deepcopy(model)
    model.resize_position_embeddings(image_size)
    assert model.config.image_size == model.crossvit.config.image_size == image_size
    assert all(positions.requires_grad for positions in model.get_position_embeddings())
    sizes = model.config.image_sizes
    pixel_values = torch.randn(2, 3, *sizes[0])
    logits = model(pixel_values).logits
    assert not torch.allclose(logits, before(pixel_values).logits)
    if image_size in ((72, 64), ((36, 72), (32, 64))):  # each branch keeps its ratio to the first, as in interpolation
        torch.testing.assert_close(logits, before(pixel_values, interpolate_pos_encoding=True).logits)

    model.save_pretrained(tmp_path)
    reloaded = CrossViTForImageClassification.from_pretrained(tmp_path)
    assert reloaded.config.image_sizes == sizes
    # The same weights elsewhere in memory may round otherwise: up to 3.6e-7 apart in models of this size
    torch.testing.assert_close(reloaded(pixel_values).logits, logits, atol=1e-5, rtol=0)
    for resized in (model, reloaded):  # interpolation keeps the ratio of the new sizes
        images = torch.randn(1, 3, *(2 * side for side in sizes[0]))
        states = resized(images, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        for tokens, (height, width), patch_size in zip(states, sizes, model.config.patch_size):
            assert tokens.shape[1] - 1 == round(2 * height / patch_size) * round(2 * width / patch_size)


@pytest.mark.parametrize("image_size", [(36,), (4, 32), (36, "32"), ((36, 36, 3), 32)])
def test_impossible_resizing_changes_nothing(model, image_size):
    with pytest.raises((ValueError, StrictDataclassError), match=r"image_size"):
        model.resize_position_embeddings(image_size)
    assert model.config.image_size == (36, 32)
    assert [tuple(positions.shape) for positions in model.get_position_embeddings()] == [(1, 37, 24), (1, 17, 32)]


# Input


@pytest.mark.parametrize(
    "pixel_values, received",
    [
        (None, "NoneType"),
        ([[0.0]], "list"),
        (torch.rand(3, 36, 36), "torch.float32 of shape (3, 36, 36)"),
        (torch.rand(0, 3, 36, 36), "torch.float32 of shape (0, 3, 36, 36)"),
        (torch.rand(2, 1, 36, 36), "torch.float32 of shape (2, 1, 36, 36)"),
        (torch.zeros(2, 3, 36, 36, dtype=torch.uint8), "torch.uint8 of shape (2, 3, 36, 36)"),
        # An image for each branch
        (torch.rand(2, 3, 3, 36, 36), "torch.float32 of shape (2, 3, 3, 36, 36)"),
        (torch.rand(2, 0, 3, 36, 36), "torch.float32 of shape (2, 0, 3, 36, 36)"),
        (torch.rand(2, 2, 1, 36, 36), "torch.float32 of shape (2, 2, 1, 36, 36)"),
        ((torch.rand(2, 3, 36, 36),) * 2, "tuple"),
    ],
)
def test_invalid_pixel_values_are_named(model, pixel_values, received):
    shapes = "(batch_size, 3, height, width), or (batch_size, 2, 3, height, width) with an image for each branch"
    backbone = CrossViTBackbone(model.config)
    for entrance in (model, model.crossvit, backbone):
        with pytest.raises(ValueError, match=rf"floating point.*{re.escape(shapes)}.*got {re.escape(received)}\."):
            entrance(pixel_values)


@torch.no_grad()
@pytest.mark.parametrize("interpolate_pos_encoding", [False, True])
@pytest.mark.parametrize("num_branches", [2, 3])
def test_each_branch_embeds_its_own_image(num_branches, interpolate_pos_encoding):
    config = CrossViTConfig(
        image_size=(36, 32, 48)[:num_branches],
        patch_size=(6, 8, 16)[:num_branches],
        embed_dim=(24, 32, 40)[:num_branches],
        num_heads=(2, 4, 5)[:num_branches],
        mlp_ratio=(2.0, 2.0, 2.0)[:num_branches],
        depth=((*[1] * num_branches, 1),),
    )
    config.out_features = config.stage_names
    backbone = perturb(CrossViTBackbone(config)).eval()

    def feature_maps(pixel_values):
        return backbone(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).feature_maps

    pixel_values = torch.randn(2, num_branches, 3, 54, 36)
    maps = feature_maps(pixel_values)
    for branch, images in enumerate(pixel_values.unbind(1)):
        expected_maps = feature_maps(images)
        torch.testing.assert_close(maps[branch], expected_maps[branch])
        same_images = images.unsqueeze(1).expand_as(pixel_values)
        torch.testing.assert_close(feature_maps(same_images), expected_maps)
    for feature_map, swapped in zip(maps, feature_maps(pixel_values.roll(1, dims=1))):
        assert (swapped - feature_map).abs().max() > 0.1


# Attention, precision, compilers


@torch.no_grad()
def test_attention_goes_through_the_interface(model, pixel_values):
    expected = model(pixel_values).logits
    calls = []

    def attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs):
        calls.append((query.shape[2], key.shape[2], module.is_causal))
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
        return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value), None

    ALL_ATTENTION_FUNCTIONS.register("by_einsum", attention)
    model.set_attn_implementation("by_einsum")
    torch.testing.assert_close(model(pixel_values).logits, expected)
    branches = [(37, 37), (17, 17), (17, 17), (1, 17), (1, 37), (37, 37), (37, 37), (17, 17), (1, 17), (1, 37)]
    assert calls == [(*lengths, False) for lengths in branches]


@torch.no_grad()
@pytest.mark.parametrize(
    "implementation", ["sdpa", "blockwise", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_attention_implementations_agree(small_config, pixel_values, implementation):
    small_config.depth = ((1, 1, 0),)  # flex attention is compiled
    model = perturb(CrossViTForImageClassification(small_config)).eval()
    model.set_attn_implementation("eager")
    expected = model(pixel_values).logits
    model.set_attn_implementation(implementation)
    # 5e-7 was measured
    torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "blockwise"])
def test_masked_tokens_are_not_attended_to(small_config, implementation):
    """The image of the first branch has 36 patches of 6 pixels and that of the second one 16 patches of 8."""
    small_config.depth = ((1, 1, 2), (1, 1, 0))
    model = perturb(CrossViTForImageClassification(small_config)).eval()
    model.set_attn_implementation(implementation)
    images = torch.randn(2, 2, 3, 36, 36)
    attention_mask = torch.ones(2, 37 + 17, dtype=torch.long)
    everywhere = model(images, attention_mask=attention_mask).logits
    torch.testing.assert_close(everywhere, model(images).logits, atol=1e-5, rtol=0)  # 5e-7 was measured
    attention_mask[0, 1] = 0  # the patch at the top left of the first branch
    logits = model(images, attention_mask=attention_mask).logits
    assert (logits - everywhere)[0].abs().max() > 1e-3
    torch.testing.assert_close(logits[1], everywhere[1], atol=1e-5, rtol=0)
    images[0, 0, :, :6, :6] += 1
    torch.testing.assert_close(model(images, attention_mask=attention_mask).logits, logits)


def test_masks_of_another_length_are_refused(model, pixel_values):
    with pytest.raises(ValueError, match=r"here \(3, 54\), for the 37 \+ 17 tokens of the branches, got \(3, 37\)"):
        model(pixel_values, attention_mask=torch.ones(3, 37))


class CalledLinear(torch.nn.Linear):
    """Not a plain linear layer, so that it is called."""


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_absorbed_projections_change_neither_logits_nor_gradients(small_config, pixel_values, qkv_bias):
    small_config.depth, small_config.qkv_bias = ((1, 2, 0), (1, 1, 2)), qkv_bias
    model = perturb(CrossViTForImageClassification(small_config)).double()
    called = copy.deepcopy(model)
    for module in called.modules():
        if isinstance(module, CrossViTCrossAttention):
            module.k_proj.__class__ = CalledLinear

    labels = torch.tensor([0, 1, 2])
    pixel_values = pixel_values.double().requires_grad_()
    outputs, expected = (each(pixel_values, labels=labels) for each in (model, called))
    # In float64 rounding is 2e-15: these are the same function
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-13, rtol=0)
    gradients = torch.autograd.grad(outputs.loss, [pixel_values, *model.parameters()])
    expected_gradients = torch.autograd.grad(expected.loss, [pixel_values, *called.parameters()])
    for gradient, expected_gradient in zip(gradients, expected_gradients):  # Every parameter has one: DDP needs that
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-13, rtol=1e-10)


class SubclassedTensor(torch.Tensor):
    """As quantized and sharded weights are."""


CHANGES = {
    "another class": lambda projection: setattr(projection, "__class__", CalledLinear),
    "another type of weight": lambda projection: setattr(
        projection, "weight", torch.nn.Parameter(projection.weight.as_subclass(SubclassedTensor), requires_grad=False)
    ),
    "part of the weight": lambda projection: setattr(projection, "weight", torch.nn.Parameter(projection.weight[:12])),
    "offloaded": lambda projection: add_hook_to_module(projection, AlignDevicesHook()),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_projections_that_are_more_than_a_weight_are_called(model, name, change):
    attention = model.crossvit.stages[0].fusions[1].layers[0].attention
    assert attention.can_absorb_projections()
    CHANGES[change](getattr(attention, name))
    assert not attention.can_absorb_projections()


@torch.no_grad()
def test_eager_attention_calls_hooks_of_every_projection(model, pixel_values):
    attention = model.crossvit.stages[0].fusions[1].layers[0].attention
    shapes = []
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        projection.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    model.set_attn_implementation("eager")
    model(pixel_values)
    # The query is the class token; the keys and values are the class token and the patches of the other branch
    assert shapes == [(3, 1, 24), (3, 37, 24), (3, 37, 24), (3, 1, 24)]


def test_fusions_drop_attention_weights_only_in_training(small_config, pixel_values):
    small_config.attention_probs_dropout_prob = 0.5
    model = perturb(CrossViTForImageClassification(small_config))
    for module in model.modules():
        if isinstance(module, CrossViTSelfAttention):
            module.attention_dropout = 0.0  # so that weights are dropped in the fusions only
    expected = model.eval()(pixel_values).logits
    torch.testing.assert_close(model(pixel_values).logits, expected)
    assert (model.train()(pixel_values).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_sdpa_can_use_fused_kernels(model, pixel_values):
    expected = model(pixel_values).logits
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where no such kernel takes the call
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_half_precision_is_close(model, pixel_values, dtype, tolerance):
    # Logits are up to 2; 1.2e-2 and 2e-3 were measured
    half = copy.deepcopy(model).to(dtype)
    for size in ((36, 36), (50, 30)):
        pixel_values = torch.nn.functional.interpolate(pixel_values, size)
        expected = model(pixel_values).logits
        for cast in (dtype, torch.float32):  # as in ViT, the input follows the weights
            logits = half(pixel_values.to(cast)).logits
            assert logits.dtype == dtype
            torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0)


IMAGE, IMAGE_FOR_EACH_BRANCH = (3, 54, 36), (2, 3, 54, 36)


@pytest.mark.parametrize(
    "backend, options, shape",
    [
        ("eager", {"output_hidden_states": True, "interpolate_pos_encoding": True}, IMAGE),
        ("eager", {}, IMAGE_FOR_EACH_BRANCH),
        pytest.param("inductor", {}, IMAGE, marks=pytest.mark.slow),
    ],
)
def test_compiles_without_a_graph_break(small_config, backend, options, shape):
    torch._dynamo.reset()
    small_config.depth = ((1, 1, 0),)
    model = perturb(CrossViTForImageClassification(small_config)).eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch_size in (3,) if backend == "inductor" else (3, 2):  # inductor takes a minute for each
        pixel_values, labels = torch.randn(batch_size, *shape), torch.arange(batch_size)
        expected = model(pixel_values, labels=labels, **options)  # with hidden states, a first call installs the hooks
        outputs = compiled(pixel_values, labels=labels, **options)
        torch.testing.assert_close(outputs.logits, expected.logits)
        gradients = torch.autograd.grad(outputs.loss, list(model.parameters()))
        expected_gradients = torch.autograd.grad(expected.loss, list(model.parameters()))
        for gradient, expected_gradient in zip(gradients, expected_gradients):
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "shape, interpolate_pos_encoding", [(IMAGE, False), (IMAGE, True), (IMAGE_FOR_EACH_BRANCH, False)]
)
def test_exports_with_a_dynamic_batch(small_config, shape, interpolate_pos_encoding):
    small_config.depth = ((1, 1, 0),)
    model = perturb(CrossViTForImageClassification(small_config)).eval()
    pixel_values = torch.randn(2, *shape)
    exported = torch.export.export(
        model,
        (pixel_values,),
        {"interpolate_pos_encoding": interpolate_pos_encoding},
        dynamic_shapes={
            "pixel_values": {0: torch.export.Dim("batch", max=4096)},
            "interpolate_pos_encoding": None,
        },
    )
    for batch_size in (1, 2, 7):
        pixel_values = torch.randn(batch_size, *shape)
        logits = exported.module()(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).logits
        expected = model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


# Training


def enable_gradient_checkpointing(model, **kwargs):
    # Later releases of transformers have another name for it
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(kwargs)


@pytest.mark.parametrize("shape", [(3, 36, 36), (2, 3, 36, 36)])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_keeps_gradients(small_config, use_reentrant, shape):
    pixel_values = torch.randn(3, *shape)
    small_config.drop_path_rate = 0.5  # so that recomputation must draw the same samples
    model = perturb(CrossViTForImageClassification(small_config)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_gradient_checkpointing(model, use_reentrant=use_reentrant)
        model.zero_grad()
        torch.manual_seed(1)
        model(pixel_values, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_gradient_checkpointing_recomputes_layers_and_fusions(model, pixel_values):
    calls = []
    for name, module in model.named_modules():
        if name.endswith("attention"):
            module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    enable_gradient_checkpointing(model.train(), use_reentrant=False)
    loss = model(pixel_values, labels=torch.tensor([0, 1, 2])).loss
    forward = sorted(calls)
    loss.backward()
    assert sorted(calls) == sorted(forward * 2) and len(forward) == 10


def test_inputs_require_gradients_in_every_branch(model, pixel_values):
    model.requires_grad_(False)
    model.enable_input_require_grads()
    states = model.crossvit(pixel_values, output_hidden_states=True).hidden_states
    assert all(state.requires_grad for state in states)
    model.disable_input_require_grads()
    assert not model(pixel_values).logits.requires_grad


LOSSES = {
    "single_label_classification": (torch.tensor([4, 0, 2]), torch.nn.functional.cross_entropy),
    "multi_label_classification": (
        torch.eye(5)[:3] + torch.eye(5)[1:4],
        torch.nn.functional.binary_cross_entropy_with_logits,
    ),
    "regression": (torch.tensor([[0.5], [-1.0], [2.0]]), torch.nn.functional.mse_loss),
}


@pytest.mark.parametrize("problem_type", LOSSES)
def test_losses(small_config, pixel_values, problem_type):
    labels, loss_function = LOSSES[problem_type]
    small_config.num_labels = 1 if problem_type == "regression" else 5
    model = CrossViTForImageClassification(small_config).eval()
    outputs = model(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.loss, loss_function(outputs.logits, labels))
    assert model.config.problem_type == problem_type


def test_loss_is_divided_by_the_items_of_the_whole_batch(model, pixel_values):
    labels = torch.tensor([4, 0, 2])
    mean = model(pixel_values, labels=labels).loss
    accumulated = model(pixel_values, labels=labels, num_items_in_batch=torch.tensor(12)).loss
    torch.testing.assert_close(accumulated, mean * 3 / 12)


# Weights


def test_arguments_of_saving_are_positional_as_in_transformers(model, tmp_path):
    weights = {name: weight + 1 for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, True, weights)
    loaded = CrossViTForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_device_map_splits_no_layer(model):
    # What takes its inputs to the device of its first weight: residuals and the tokens of two branches
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    for limit in range(size // 4, size, size // 20):
        device_map = infer_auto_device_map(
            model, max_memory={"cpu": limit}, no_split_module_classes=list(model._no_split_modules)
        )
        assert set(device_map.values()) == {"cpu", "disk"}
        assert not [name for name in device_map if re.search(r"(embeddings|layers|fusions)\.\d+\.", name)]


@torch.no_grad()
def test_offloaded_model_gives_the_same_logits(model, pixel_values, tmp_path):
    expected = model(pixel_values).logits
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "crossvit.embeddings": "cpu",
        "crossvit.layernorms": "disk",
        "classifier": "cpu",
        "crossvit.stages.0.branches": "cpu",
        "crossvit.stages.0.fusions": "disk",
        "crossvit.stages.1": "disk",
    }
    offloaded = CrossViTForImageClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    # 4e-7 was measured: projections whose weights come from elsewhere are called, plain ones absorbed
    torch.testing.assert_close(offloaded(pixel_values).logits, expected, atol=5e-6, rtol=0)


# Backbone


@torch.no_grad()
def test_feature_maps_lie_where_the_patches_are(small_config):
    small_config.out_features = ["stem_0", "stem_1", "stage2_0"]
    backbone = CrossViTBackbone(small_config).eval()
    assert (backbone.channels, backbone.out_indices) == ([24, 32, 24], [0, 1, 4])
    # One bright pixel: without attention only the patches that hold it differ
    dark, bright = torch.zeros(1, 3, 72, 36), torch.zeros(1, 3, 72, 36)
    bright[..., 50, 20] = 10.0
    maps = [backbone(image).feature_maps for image in (dark, bright)]
    assert [tuple(map.shape) for map in maps[0]] == [(1, 24, 12, 6), (1, 32, 8, 4), (1, 24, 12, 6)]
    difference = (maps[1][0] - maps[0][0]).abs().sum(dim=1)[0]
    assert difference.nonzero().tolist() == [[50 // 6, 20 // 6]]
    second = (maps[1][1] - maps[0][1]).abs().sum(dim=1)[0]
    assert divmod(second.argmax().item(), 4) == (50 * 64 // 72 // 8, 20 * 32 // 36 // 8)

    native = backbone(bright, interpolate_pos_encoding=False).feature_maps
    assert [tuple(map.shape) for map in native] == [(1, 24, 6, 6), (1, 32, 4, 4), (1, 24, 6, 6)]


def test_classifier_checkpoint_loads_as_a_backbone(model, pixel_values, tmp_path):
    model.save_pretrained(tmp_path)
    backbone = CrossViTBackbone.from_pretrained(tmp_path, out_indices=[-2, -1]).eval()
    assert backbone.out_features == ["stage2_0", "stage2_1"]
    states = model(pixel_values, output_hidden_states=True).hidden_states
    for feature_map, tokens in zip(backbone(pixel_values).feature_maps, states[-2:]):
        assert torch.equal(feature_map.flatten(2).transpose(1, 2), tokens[:, 1:])
