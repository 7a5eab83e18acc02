"""Attention maps: the weights of the right layer, in the right place of the image."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from attention_weights import ARCHITECTURES, change, make_model, record_weights

from crossvit import (
    CrossViTBackbone,
    CrossViTConfig,
    CrossViTForImageClassification,
    CrossViTImageProcessor,
    CrossViTImageProcessorPil,
)
from crossvit.interpretability import AttentionMap, AttentionMaps, CropRegion, attention_maps, attention_rollout


# Weights are rounded to float32 by the softmax: rows were off by 1.8e-7 at most
ROW_TOLERANCE = 1e-6


def make_processor(height: int = 36, width: int = 36, **options) -> CrossViTImageProcessor:
    options = {"size": {"shortest_edge": 41}, "crop_size": {"height": height, "width": width}, **options}
    return CrossViTImageProcessor(**options)


def make_image(width: int = 50, height: int = 44) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.fixture(params=ARCHITECTURES)
def config(request, small_config) -> CrossViTConfig:
    return change(small_config, **ARCHITECTURES[request.param])


@pytest.fixture
def model(small_config) -> CrossViTForImageClassification:
    return make_model(small_config)


def total(attention) -> float:
    return sum(attention.class_tokens.values()) + sum(shares.sum() for shares in attention.patches.values())


def test_each_map_has_the_weights_of_its_layer(config):
    model, processor, image = make_model(config), make_processor(), make_image()
    with torch.no_grad():
        _, recorded = record_weights(model, processor(image, return_tensors="pt").pixel_values)
    weights = {name: tensor[0].numpy() for name, tensor in recorded.items()}
    maps = AttentionMaps(model, processor, image)
    checked = 0
    for stage, (*depths, _) in enumerate(config.depth):
        for branch, depth in enumerate(depths):
            next_branch = (branch + 1) % config.num_branches
            for layer in range(depth):
                expected = weights[f"crossvit.stages.{stage}.branches.{branch}.layers.{layer}.attention"]
                for head in (None, 0, -1):
                    for token in (0, 3, -1):
                        attention = maps.self_attention(branch, stage, layer, head, token)
                        row = (expected.mean(axis=0) if head is None else expected[head])[token]
                        assert list(attention.class_tokens) == list(attention.patches) == [branch]
                        assert attention.patches[branch].shape == maps.grid_sizes[branch]
                        assert np.allclose(attention.patches[branch].ravel(), row[1:], rtol=1e-6, atol=0)
                        assert np.isclose(attention.class_tokens[branch], row[0], rtol=1e-6, atol=0)
                        assert total(attention) == pytest.approx(1, abs=ROW_TOLERANCE)
                        checked += 1
            expected = weights[f"crossvit.stages.{stage}.fusions.{branch}.layers.0.attention"]
            for head in (None, 1):
                attention = maps.cross_attention(branch, stage, head)
                row = (expected.mean(axis=0) if head is None else expected[head])[0]
                assert list(attention.class_tokens) == [branch] and list(attention.patches) == [next_branch]
                assert attention.patches[next_branch].shape == maps.grid_sizes[next_branch]
                assert np.allclose(attention.patches[next_branch].ravel(), row[1:], rtol=1e-6, atol=0)
                assert total(attention) == pytest.approx(1, abs=ROW_TOLERANCE)
    assert checked >= 6 * 9


def test_rollout_has_the_shares_of_attention_rollout(config):
    maps = AttentionMaps(make_model(config), make_processor(), make_image())
    for branch in (None, *range(config.num_branches)):
        rollout = maps.rollout(branch)
        assert total(rollout) == pytest.approx(1, abs=ROW_TOLERANCE)
        expected = [shares[0].numpy() for shares in attention_rollout(maps.outputs, config, branch)]
        assert [*rollout.class_tokens] == [*rollout.patches] == [*rollout.crops] == [*range(config.num_branches)]
        for other, shares in enumerate(expected):
            assert rollout.class_tokens[other] == shares[0]
            assert rollout.patches[other].shape == maps.grid_sizes[other]
            assert np.array_equal(rollout.patches[other].ravel(), shares[1:])
        of_patches = 1 - sum(rollout.class_tokens.values())
        assert rollout.on_image().sum() == pytest.approx(of_patches, abs=ROW_TOLERANCE)


@pytest.mark.parametrize("backend", [CrossViTImageProcessor, CrossViTImageProcessorPil])
@pytest.mark.parametrize(
    "size, options",
    [
        ((240, 240), {}),
        ((250, 120), {}),
        ((91, 203), {}),
        ((180, 77), {"size": {"height": 300, "width": 280}}),
        ((200, 160), {"do_resize": False, "crop_size": {"height": 121, "width": 90}}),
        ((200, 160), {"do_center_crop": False}),
        ((60, 250), {"do_resize": False, "crop_size": {"height": 180, "width": 101}}),  # padded at the top and bottom
    ],
)
def test_cells_are_aligned_with_the_pixels_that_the_image_processor_crops(backend, size, options):
    """Against the coordinates of the pixels of a cell, carried through the processor by an image of coordinates."""
    columns_of_image, rows_of_image = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    # Blue is 255 in the image and 0 in the padding
    coordinates = np.stack((rows_of_image, columns_of_image, np.full_like(rows_of_image, 255)), axis=-1)
    image = PIL.Image.fromarray(coordinates.astype(np.uint8))
    processor = backend(do_rescale=False, do_normalize=False, **options)
    pixel_values = processor(image, return_tensors="pt").pixel_values
    crop = CropRegion.from_image(processor, image)

    height, width = pixel_values.shape[-2:]
    for top, left, cell in ((0, 0, 10), (height - 12, width - 12, 12), (height // 2, width // 3, 9)):
        pixels = pixel_values[0, :, top : top + cell, left : left + cell].double().numpy()
        values = np.zeros((height, width))
        values[top : top + cell, left : left + cell] = 1
        aligned = crop.align(values)
        if (pixels[2] < 1).all():  # in the padding
            assert aligned.sum() == 0
            continue
        weights = aligned / aligned.sum()
        inside = pixels[2] > 254
        found = [(weights.sum(axis=1) * np.arange(size[1])).sum(), (weights.sum(axis=0) * np.arange(size[0])).sum()]
        expected = [pixels[channel][inside].mean() for channel in (0, 1)]
        # Coordinates are rounded to bytes after the resizing: 0.15 pixels were measured
        assert np.allclose(found, expected, atol=0.25), (found, expected)


def make_white_detector(small_config) -> CrossViTForImageClassification:
    """A model whose class tokens attend to white patches, wherever they are."""
    config = change(small_config, depth=((1, 1, 0),), num_heads=(1, 1))
    model = CrossViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for embeddings in model.crossvit.embeddings:
            feature = embeddings.patch_embeddings.projection.weight[0]
            feature.fill_(1 / feature.numel())
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1)
            # Keys are the first feature; the constant queries are so large that other patches get no attention
            if name.endswith("attention.qkv"):
                width = module.in_features
                module.weight[width, 0] = 1
                module.bias[0] = 100
            if name.endswith("attention.k_proj"):
                module.weight[0, 0] = 1
            if name.endswith("attention.q_proj"):
                module.bias[0] = 100
    return model


def draw_spot(size: tuple[int, int], place: tuple[float, float], processor) -> PIL.Image.Image:
    """A black image of (width, height) with a white spot a little smaller than a patch of the first branch."""
    image = PIL.Image.new("RGB", size)
    crop = CropRegion.from_image(processor, image)
    half = max(0.5, 2.5 * min(crop.size) / 36)
    column, row = place[0] * size[0], place[1] * size[1]
    image.paste("white", (int(column - half), int(row - half), int(column + half) + 1, int(row + half) + 1))
    return image


def assert_is_on_the_spot(attention: AttentionMap, branch: int, image: PIL.Image.Image):
    """Checks that the map of the patches of a branch is at most a patch away from the white spot of its image."""
    center = np.argwhere(np.asarray(image)[..., 0]).mean(axis=0)
    patch = np.array(attention.crops[branch].size) / attention.patches[branch].shape
    aligned = attention.on_image(branch=branch)
    assert aligned.shape == (image.height, image.width)
    assert aligned.sum() == pytest.approx(attention.patches[branch].sum(), abs=ROW_TOLERANCE)
    aligned /= aligned.sum()
    found = [
        (aligned.sum(axis=1) * np.arange(image.height)).sum(),
        (aligned.sum(axis=0) * np.arange(image.width)).sum(),
    ]
    assert (np.abs(found - center) <= patch).all(), (found, center, patch)
    smooth = attention.on_image(smooth=True, branch=branch)
    peak = np.unravel_index(smooth.argmax(), smooth.shape)
    assert (np.abs(peak - center) <= patch + 1).all(), (peak, center, patch)


SPOT_PROCESSOR = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}


@pytest.mark.parametrize("interpolate_pos_encoding", [False, True])
@pytest.mark.parametrize(
    "sizes, options",
    [
        (((300, 200), (70, 120)), {}),
        (((100, 71), (31, 90)), {"do_resize": False}),  # the second is padded on the left and right
    ],
)
def test_attention_to_a_white_spot_is_drawn_where_the_spot_is(small_config, sizes, options, interpolate_pos_encoding):
    processor = make_processor(48, 48, **SPOT_PROCESSOR, **options)
    images = [draw_spot(sizes[0], (0.42, 0.6), processor), draw_spot(sizes[1], (0.62, 0.41), processor)]
    maps = AttentionMaps(make_white_detector(small_config), processor, images, interpolate_pos_encoding)
    for branch in (0, 1):
        for attention in (maps.self_attention(branch), maps.cross_attention(1 - branch)):
            assert attention.patches[branch].shape == maps.grid_sizes[branch]
            assert_is_on_the_spot(attention, branch, images[branch])
        assert_is_on_the_spot(maps.rollout(), branch, images[branch])


def test_images_of_the_branches_are_turned_upright(model, tmp_path):
    turned = [make_image(60, 41), make_image(50, 44)]
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    for branch, image in enumerate(turned):
        image.save(tmp_path / f"{branch}.png", exif=exif)
    maps = AttentionMaps(model, make_processor(), (PIL.Image.open(tmp_path / "0.png"), str(tmp_path / "1.png")))
    assert [image.size for image in maps.images] == [(41, 60), (44, 50)]
    assert [crop.image_size for crop in maps.crops] == [(60, 41), (50, 44)]
    upright = [image.transpose(PIL.Image.Transpose.ROTATE_270) for image in turned]
    expected = AttentionMaps(model, make_processor(), upright).rollout()
    for branch in (0, 1):
        assert np.array_equal(maps.rollout().on_image(branch=branch), expected.on_image(branch=branch))


def test_maps_do_not_keep_the_attention_of_all_tokens(config):
    maps = AttentionMaps(make_model(config), make_processor(), make_image())
    for attention in maps.class_token_maps().values():
        assert all(patches.base is None for patches in attention.patches.values())


def test_one_image_is_that_of_every_branch(config):
    model, processor, image = make_model(config), make_processor(), make_image()
    maps = AttentionMaps(model, processor, image)
    assert len(maps.images) == len(maps.crops) == config.num_branches
    assert len(set(map(id, maps.images))) == len(set(map(id, maps.crops))) == 1
    repeated = AttentionMaps(model, processor, [image] * config.num_branches)
    # No difference was measured; kernels may differ in the last digit of float32 by the layout of their input
    assert np.allclose(repeated.rollout().on_image(), maps.rollout().on_image(), rtol=1e-6, atol=0)
    summed = sum(maps.rollout().on_image(branch=branch) for branch in range(config.num_branches))
    assert np.allclose(maps.rollout().on_image(), summed, rtol=1e-9, atol=0)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_wrong_number_of_images_is_refused_before_they_are_read(model, number):
    with pytest.raises(ValueError, match=f"one image or 2, one for each branch of the model, got {number}"):
        AttentionMaps(model, None, ["missing.png"] * number)


def test_maps_that_cannot_be_drawn_on_one_image_name_the_remedy(model):
    maps = AttentionMaps(model, make_processor(), (make_image(50, 44), make_image(44, 50)))
    with pytest.raises(ValueError, match=r"branches \[0, 1\] have different sizes.*choose one of them with `branch`"):
        maps.rollout().on_image()
    with pytest.raises(ValueError, match=r"`branch=0` must be one of \[1\]"):
        maps.cross_attention(0).on_image(branch=0)


def test_scaled_copy_has_the_same_attention(model):
    attention = AttentionMaps(model, make_processor(), make_image()).rollout()
    whole = attention.on_image()
    half = attention.on_image(image_size=(22, 25))
    assert np.allclose(half, whole.reshape(22, 2, 25, 2).sum(axis=(1, 3)), atol=1e-9)


def test_smooth_maps_keep_constants_and_order():
    crop = CropRegion((50, 70), (4.5, 10.0), (40.0, 50.0))
    ones = crop.align(np.ones((4, 5)), smooth=True)
    assert np.allclose(ones, crop.align(np.ones((4, 5))))
    assert ones[:4].max() == 0 and np.allclose(ones[5:44, 10:60], 1)
    assert np.allclose(ones[4], np.where(ones[5], 0.5, 0))  # half a pixel
    ramp = crop.align(np.arange(5.0)[None].repeat(4, axis=0), smooth=True)
    # Splines reproduce linear values, except at the edges
    assert np.allclose(ramp[20, 25:45], (np.arange(15, 35) + 0.5) / 10 - 0.5)
    assert (np.diff(ramp[20, 10:60]) >= -1e-9).all()


def test_later_images_are_drawn_where_the_first_is(model):
    """The image processor resizes them to the first: its crop shows the same part of both, in their own pixels."""
    image = make_image(60, 44)
    maps = AttentionMaps(model, make_processor(), (image, image.resize((90, 132))))
    first, second = maps.crops
    assert first.image_size == (44, 60) and second.image_size == (132, 90)
    for axis, ratio in enumerate((3, 1.5)):
        assert second.origin[axis] == pytest.approx(ratio * first.origin[axis])
        assert second.size[axis] == pytest.approx(ratio * first.size[axis])


def test_more_than_8_bits_are_refused(model, tmp_path):
    image = PIL.Image.fromarray(np.full((44, 60), 40_000, np.uint16))
    image.save(tmp_path / "image.png")
    for wrong in (image, str(tmp_path / "image.png"), (make_image(), image)):
        with pytest.raises(ValueError, match=r"mode I(;16)? instead of 8 bits per channel"):
            AttentionMaps(model, make_processor(), wrong)


@pytest.mark.parametrize("backend", [CrossViTImageProcessor, CrossViTImageProcessorPil])
@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (30, 6500)])
def test_extreme_aspect_ratio_is_refused_before_anything_is_resized(model, monkeypatch, backend, size):
    monkeypatch.setattr(backend, "resize", lambda *args, **kwargs: pytest.fail("the image is resized"))
    message = rf"{size[0]}x{size[1]} pixels .*, which is more than 16,000,000: crop it"
    with pytest.raises(ValueError, match=message):
        AttentionMaps(model, backend(), PIL.Image.new("RGB", size))


def test_long_images_are_not_refused_unless_they_grow(model, monkeypatch):
    monkeypatch.setattr(attention_maps, "MAX_RESIZED_PIXELS", 41 * 100)
    processor = make_processor()  # which resizes the shortest edge to 41 pixels
    assert AttentionMaps(model, processor, make_image(41, 100)).outputs.logits.shape == (1, 5)
    with pytest.raises(ValueError, match="crop it"):
        AttentionMaps(model, processor, make_image(40, 100))
    processor.do_resize = False
    assert AttentionMaps(model, processor, make_image(1, 5000)).outputs.logits.shape == (1, 5)


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_model_is_left_as_it_was(small_config, implementation, training):
    small_config.hidden_dropout_prob = small_config.attention_probs_dropout_prob = 0.5
    model = make_model(small_config).train(training)
    model.set_attn_implementation(implementation)
    first = AttentionMaps(model, make_processor(), make_image())
    second = AttentionMaps(model, make_processor(), make_image())
    assert total(first.self_attention(0)) == pytest.approx(1, abs=ROW_TOLERANCE)  # which dropout would change
    assert torch.equal(first.outputs.logits, second.outputs.logits)
    assert model.training == training and model.config._attn_implementation == implementation
    assert not first.outputs.logits.requires_grad
    model.crossvit.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        AttentionMaps(model, make_processor(), make_image())
    assert model.training == training and model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    "method, arguments, message",
    [
        ("self_attention", {"branch": -3}, "`branch=-3` is out of range: there are 2,"),
        ("self_attention", {"branch": 0, "stage": 2}, "`stage=2` is out of range: there are 2,"),
        ("self_attention", {"branch": 0, "stage": 0, "layer": 1}, "there are 1 in branch 0 of stage 0,"),
        ("self_attention", {"branch": 1, "token": 17}, "`token=17` is out of range: there are 17,"),
        ("cross_attention", {"branch": 5}, "`branch=5`"),
        ("cross_attention", {"branch": 0, "head": 4}, "`head=4`"),
        ("rollout", {"branch": 2}, "`branch=2`"),
    ],
)
def test_index_out_of_range_is_named(model, method, arguments, message):
    maps = AttentionMaps(model, make_processor(), make_image())
    with pytest.raises(ValueError, match=message):
        getattr(maps, method)(**arguments)


def test_class_token_maps_are_those_of_the_branches_with_layers(small_config):
    small_config.depth = ((0, 2, 0),)
    maps = AttentionMaps(make_model(small_config), make_processor(), make_image())
    for head in (None, 1):
        named = maps.class_token_maps(stage=0, head=head)
        assert [title.split("\n")[1] for title in named] == ["self-attention", "cross-attention", "cross-attention"]
        expected = [maps.self_attention(1, head=head), *(maps.cross_attention(branch, head=head) for branch in (0, 1))]
        for title, found, known in zip(named, named.values(), expected):
            assert np.array_equal(found.on_image(), known.on_image()), title


def test_threads_do_not_mix_their_maps(model):
    model.set_attn_implementation("eager")
    images = [make_image(40 + number, 44) for number in range(8)]
    processor = make_processor()
    expected = [AttentionMaps(model, processor, image).rollout().on_image() for image in images]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(2):
            maps = threads.map(lambda image: AttentionMaps(model, processor, image).rollout().on_image(), images)
            assert all(np.array_equal(found, known) for found, known in zip(maps, expected))


def test_backbone_is_refused(small_config):
    with pytest.raises(ValueError, match="got a BackboneOutput"):
        AttentionMaps(CrossViTBackbone(small_config), make_processor(), make_image())


def test_base_and_adapted_models_have_the_same_maps(model):
    from peft import LoraConfig, get_peft_model

    image, processor = make_image(), make_processor()
    expected = AttentionMaps(model, processor, image).rollout().on_image()
    assert np.array_equal(AttentionMaps(model.crossvit, processor, image).rollout().on_image(), expected)
    adapted = get_peft_model(model, LoraConfig(target_modules=["qkv", "k_proj"]))  # which changes nothing at first
    assert np.allclose(AttentionMaps(adapted, processor, image).rollout().on_image(), expected, atol=1e-6)
