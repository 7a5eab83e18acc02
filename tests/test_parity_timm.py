"""
The same weights give the same numbers in timm, for every published variant.

timm's logits equal those of the authors' code bit by bit. Ours differ from timm's by rounding: fused and unfused
attention add up in different orders. The largest difference measured over all variants, sizes and attention
implementations was 2.6e-6, of logits up to 2.9; 1e-5 is the promise. To see the differences:
`python -m pytest tests/test_parity_timm.py -k logits_and -rP`.
"""

import pytest
import timm
import torch
from reference import VARIANTS, to_transformers_name
from scipy.stats import ks_2samp
from timm.layers import DropPath
from timm.models.crossvit import MultiScaleBlock
from timm_reference import our_state_dict, perturb, timm_of_config, timm_variant

from crossvit import CrossViTBackbone, CrossViTConfig, CrossViTForImageClassification
from crossvit.modeling_crossvit import CrossViTDropPath
from crossvit.timm_checkpoints import ARCHITECTURES


LOGITS_TOLERANCE = 1e-5
# In the native size of the first branch, and in one that every branch resizes
IMAGE_FOR_EACH_BRANCH = [(2, 3, 240, 240), (2, 3, 256, 128)]


LARGE = ("crossvit_base", "crossvit_15_dagger_384", "crossvit_18_dagger_384")  # more than ten seconds each


def create_on_meta(config: CrossViTConfig) -> CrossViTForImageClassification:
    """A model without weights, which takes no time to initialize."""
    with torch.device("meta"):
        return CrossViTForImageClassification(config).eval()


def config_of(variant: dict, **kwargs) -> CrossViTConfig:
    return CrossViTConfig(**ARCHITECTURES[variant["architecture"]], num_labels=1000, **kwargs)


def with_weights_of(config: CrossViTConfig, reference: torch.nn.Module) -> CrossViTForImageClassification:
    model = create_on_meta(config)
    model.load_state_dict(our_state_dict(reference), assign=True)
    return model


def assert_gradients_are_close(gradient: torch.Tensor, expected: torch.Tensor, name: str):
    # Relative to the largest entry of each tensor: 9e-6 was measured. Exact zeros of timm's: the biases of keys,
    # which the softmax cancels, are pure rounding in both.
    scale = max(expected.abs().max().item(), 1e-3)
    assert (gradient - expected).abs().max().item() <= 5e-5 * scale, name


@torch.no_grad()
@pytest.mark.parametrize(
    "variant",
    [pytest.param(VARIANTS[name], marks=pytest.mark.slow if name in LARGE else (), id=name) for name in VARIANTS],
)
def test_logits_and_stage_tokens_equal_timm(variant):
    reference = timm_variant(variant)
    model = with_weights_of(config_of(variant), reference)
    assert model.num_parameters() == variant["parameters"] and len(model.state_dict()) == variant["tensors"]

    stages = []
    for block in reference.blocks:
        block.register_forward_hook(lambda block, args, outputs: stages.append(outputs))

    largest_difference = 0.0
    native = variant["preprocessing"]["input"]
    sizes = ((native, native), (224, 224), (256, 128), (64, 64))
    for batch_size, (height, width) in zip((2, 1, 1, 1), sizes):
        pixel_values = torch.randn(batch_size, 3, height, width)
        stages.clear()
        expected = reference(pixel_values)
        for attn_implementation in ("eager", "sdpa"):
            model.set_attn_implementation(attn_implementation)
            outputs = model(pixel_values, output_hidden_states=True)
            difference = (outputs.logits - expected).abs().max().item()
            assert difference <= LOGITS_TOLERANCE, (attn_implementation, height, width)
            largest_difference = max(largest_difference, difference)

            tokens = [branch for stage in (reference._embed(pixel_values), *stages) for branch in stage]
            assert len(outputs.hidden_states) == len(tokens) == len(model.config.stage_names)
            for hidden_states, expected_tokens in zip(outputs.hidden_states, tokens):
                # Tokens are up to 40 in size, where float32 resolves 4e-6: 4e-5 were measured
                torch.testing.assert_close(hidden_states, expected_tokens, atol=1e-4, rtol=1e-5)
    print(f"{variant['name']}: {largest_difference:.1e}")


def test_default_config_is_crossvit_15():
    assert CrossViTConfig(**ARCHITECTURES["crossvit_15_240"]).to_dict() == CrossViTConfig().to_dict()


@pytest.mark.parametrize("shape", [(3, 240, 240), *IMAGE_FOR_EACH_BRANCH])
@pytest.mark.parametrize("multi_conv", [False, True])
def test_gradients_in_train_mode_equal_timm(multi_conv, shape):
    config = CrossViTConfig(
        embed_dim=(96, 192), depth=((1, 3, 0),) * 3, num_heads=(3, 3), multi_conv=multi_conv, num_labels=7
    )
    reference = timm_of_config(config).train()
    model = with_weights_of(config, reference).train()

    labels = torch.tensor([0, 3, 6])
    pixel_values = torch.randn(3, *shape, requires_grad=True)
    expected_logits = reference(pixel_values)
    torch.nn.functional.cross_entropy(expected_logits, labels).backward()
    expected_gradient, pixel_values.grad = pixel_values.grad, None
    outputs = model(pixel_values, labels=labels)
    outputs.loss.backward()

    torch.testing.assert_close(outputs.logits, expected_logits, atol=LOGITS_TOLERANCE, rtol=0)
    assert_gradients_are_close(pixel_values.grad, expected_gradient, "pixel_values")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert_gradients_are_close(gradients.pop(to_transformers_name(name)), parameter.grad, name)
    assert not gradients


def test_dropouts_and_drop_paths_equal_timm_draw_by_draw():
    config = CrossViTConfig(
        embed_dim=(96, 192), depth=((1, 2, 0), (1, 2, 2)), num_heads=(3, 3), drop_path_rate=0.5, num_labels=10
    )
    reference = timm_of_config(config, pos_drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.2).train()
    for module in reference.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # whose dropout draws in another order
    config.hidden_dropout_prob, config.attention_probs_dropout_prob = 0.1, 0.2
    config._attn_implementation = "eager"
    model = with_weights_of(config, reference).train()
    pixel_values = torch.randn(4, 3, 240, 240)
    logits = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        expected = reference(pixel_values)
        torch.manual_seed(seed)
        logits.append(model(pixel_values).logits)
        torch.testing.assert_close(logits[-1], expected, atol=LOGITS_TOLERANCE, rtol=0)
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2], atol=0.01)


def test_drop_path_rates_equal_timm(variant):
    with torch.device("meta"):
        reference = timm.create_model(variant["timm_id"].removeprefix("timm/"), drop_path_rate=0.1)
    model = create_on_meta(config_of(variant, drop_path_rate=0.1))

    ours = {
        name: module.drop_path_rate for name, module in model.named_modules() if isinstance(module, CrossViTDropPath)
    }
    theirs = {}
    for name, module in reference.named_modules():
        if name.endswith(("drop_path1", "drop_path")):  # drop_path2 is that of the same layer
            rate = module.drop_prob if isinstance(module, DropPath) else 0.0
            layer = name.rpartition(".")[0]
            our_layer = to_transformers_name(f"{layer}.norm1.weight").rsplit(".", 2)[0]
            theirs[f"{our_layer}.drop_path"] = rate

    assert ours.keys() == theirs.keys()
    for name, rate in ours.items():
        assert rate == pytest.approx(theirs[name], abs=1e-7), name  # timm's are float32
    assert max(ours.values()) == pytest.approx(0.1)


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    drop_path = CrossViTDropPath(0.25).train()
    dropped = drop_path(torch.ones(20_000, 2, 3))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (dropped.amin(dim=(1, 2)) == dropped.amax(dim=(1, 2))).all()
    # The standard error of the mean is 0.004
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert (drop_path.eval()(torch.ones(20, 2, 3)) == 1).all()


@pytest.mark.parametrize("multi_conv", [False, True])
def test_initialization_equals_timm_in_distribution(multi_conv):
    reference = timm.create_model("crossvit_9_dagger_240" if multi_conv else "crossvit_9_240").state_dict()
    config = CrossViTConfig(
        embed_dim=(128, 256), depth=((1, 3, 0),) * 3, num_heads=(4, 4), multi_conv=multi_conv, num_labels=1000
    )
    weights = CrossViTForImageClassification(config).state_dict()
    for name, expected in reference.items():
        weight = weights[to_transformers_name(name)]
        if expected.std() == 0:  # norms, biases
            torch.testing.assert_close(weight, expected)
        else:
            # Two samples of one distribution: of 200 tensors, a p-value below one in a million is not an accident
            assert ks_2samp(weight.flatten()[:20_000], expected.flatten()[:20_000]).pvalue > 1e-6, name


@torch.no_grad()
@pytest.mark.parametrize("cross_attention_layers", [0, 1, 2])
def test_documented_configuration_and_cross_attention_layers_equal_timm(cross_attention_layers):
    # The configuration of the model's public documentation, word for word but for the last entries of `depth`
    config = CrossViTConfig(
        img_size=(240, 224),
        patch_size=(12, 16),
        num_classes=1000,
        embed_dim=(192, 384),
        depth=((1, 3, cross_attention_layers),) * 3,
        num_heads=(6, 12),
        mlp_ratio=(2.0, 2.0, 4.0),
    )
    reference = timm_of_config(config)
    model = with_weights_of(config, reference)
    pixel_values = torch.randn(2, 3, 240, 240)
    torch.testing.assert_close(model(pixel_values).logits, reference(pixel_values), atol=LOGITS_TOLERANCE, rtol=0)


@torch.no_grad()
def test_branch_without_layers_is_an_identity():
    config = CrossViTConfig(depth=((0, 2, 0), (1, 0, 0)), num_labels=10)
    # timm misaligns such branches. Its layers whose sublayers end in zeros, which return their input, replace them.
    reference = timm_of_config(CrossViTConfig(depth=((1, 2, 0), (1, 1, 0)), num_labels=10))
    for layer in (reference.blocks[0].blocks[0][0], reference.blocks[1].blocks[1][0]):
        for linear in (layer.attn.proj, layer.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    model = CrossViTForImageClassification(config).eval()
    missing, unexpected = model.load_state_dict(our_state_dict(reference), strict=False)
    assert not missing
    assert {name.rsplit(".layers.0.")[0] for name in unexpected} == {
        "crossvit.stages.0.branches.0",
        "crossvit.stages.1.branches.1",
    }
    pixel_values = torch.randn(2, 3, 240, 240)
    torch.testing.assert_close(model(pixel_values).logits, reference(pixel_values), atol=LOGITS_TOLERANCE, rtol=0)


@torch.no_grad()
def test_three_branches_equal_timm_stage_by_stage():
    config = CrossViTConfig(
        image_size=(48, 40, 64),
        patch_size=(6, 8, 16),
        embed_dim=(24, 32, 40),
        num_heads=(2, 4, 5),
        mlp_ratio=(2, 3, 4),
        depth=((1, 2, 1, 1), (2, 1, 1, 2)),
        num_labels=4,
    )
    model = perturb(CrossViTForImageClassification(config)).eval()
    outputs = model(torch.randn(2, 3, 48, 48), output_hidden_states=True)
    states = [list(outputs.hidden_states[start : start + 3]) for start in (0, 3, 6)]

    # timm's model has two branches, its stages any number
    for stage, depth in enumerate(config.depth):
        block = MultiScaleBlock(
            config.embed_dim, None, depth, config.num_heads, config.mlp_ratio, qkv_bias=True, drop_path=[0.0] * 4
        )
        for norm in block.modules():
            if isinstance(norm, torch.nn.LayerNorm):
                norm.eps = config.layer_norm_eps
        prefix = f"blocks.{stage}."
        weights = model.state_dict()
        block.load_state_dict({name: weights[to_transformers_name(prefix + name)] for name in block.state_dict()})
        for tokens, expected in zip(states[stage + 1], block.eval()(states[stage])):
            torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)

    norms = [norm(tokens[:, 0]) for norm, tokens in zip(model.crossvit.layernorms, states[-1])]
    logits = torch.stack([head(token) for head, token in zip(model.classifier.heads, norms)]).mean(dim=0)
    torch.testing.assert_close(outputs.logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 240, 240), *IMAGE_FOR_EACH_BRANCH])
def test_feature_maps_and_features_equal_timm(shape):
    config = CrossViTConfig(embed_dim=(96, 192), depth=((1, 2, 0), (1, 1, 0)), num_heads=(3, 3), num_labels=0)
    reference = timm_of_config(config)
    backbone = CrossViTBackbone(
        CrossViTConfig(**{**config.to_diff_dict(), "out_features": ["stage1_0", "stage1_1", "stage2_0", "stage2_1"]})
    ).eval()
    backbone.load_state_dict(our_state_dict(reference))
    pixel_values = torch.randn(2, *shape)
    _, expected = reference.forward_intermediates(pixel_values)
    feature_maps = backbone(pixel_values, interpolate_pos_encoding=False).feature_maps
    # timm's order is branch, then stage
    for feature_map, expected_map in zip(feature_maps, [expected[i] for i in (0, 2, 1, 3)]):
        torch.testing.assert_close(feature_map, expected_map, atol=1e-4, rtol=1e-5)

    # Without classes timm returns the class tokens
    model = with_weights_of(config, reference)
    outputs, expected_features = model.crossvit(pixel_values), reference(pixel_values)
    torch.testing.assert_close(model(pixel_values).logits, expected_features, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.pooler_output, expected_features, atol=1e-5, rtol=0)
    expected_tokens = reference.forward_features(pixel_values)[-1]
    torch.testing.assert_close(outputs.last_hidden_state, expected_tokens, atol=1e-5, rtol=0)
