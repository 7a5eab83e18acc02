"""Pictures of attention: colors and the scale."""

import numpy as np
import PIL.Image

from crossvit.interpretability import AttentionMap, CropRegion, draw_attention, overlay


def test_only_more_than_uniform_attention_is_drawn():
    image = PIL.Image.effect_noise((30, 20), 90)
    unchanged = np.asarray(image.convert("RGB"))
    values = np.ones((20, 30))
    assert np.array_equal(overlay(image, values), unchanged)
    assert np.array_equal(overlay(image, 0 * values), unchanged) and np.array_equal(overlay(image, -values), unchanged)
    # 10 % above uniform attention changes colors by 8 of 255 at most
    assert np.abs(np.asarray(overlay(image, 1.1 * values), dtype=int) - unchanged).max() < 10
    values[5, 7], values[6, 8] = 3, 12
    changes = np.abs(np.asarray(overlay(image, values), dtype=int) - unchanged).sum(axis=2)
    assert set(zip(*changes.nonzero())) == {(5, 7), (6, 8)}
    assert np.array_equal(overlay(image, 0 * values + 16), overlay(image, 0 * values + 99))


def test_peak_is_a_multiple_of_uniform_attention():
    patches = np.full((4, 4), 0.25 / 16)
    patches[1, 2] += 0.5  # (0.5 + 0.25 / 16) / (0.75 / 16) = 11
    crop = CropRegion((40, 40), (0.0, 0.0), (40.0, 40.0))
    image = PIL.Image.new("RGB", (40, 40), "white")
    picture, peak = draw_attention(image, AttentionMap({0: 0.25}, {0: patches}, {0: crop}))
    assert peak == "max 11.0x" and picture.size == (480, 480)
    uniform = AttentionMap({0: 0.9}, {0: np.full((4, 4), 0.1 / 16)}, {0: crop})
    picture, peak = draw_attention(image, uniform)
    assert peak == "max 1.0x" and picture.getextrema() == ((255, 255),) * 3
    only_class_token = AttentionMap({0: 1.0}, {0: np.zeros((4, 4))}, {0: crop})
    picture, peak = draw_attention(image, only_class_token)
    assert peak == "max 0.0x" and picture.getextrema() == ((255, 255),) * 3
