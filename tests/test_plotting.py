"""Pictures, and importing what draws them."""

import subprocess
import sys

import numpy as np
import PIL.Image

from crossvit.interpretability import overlay


def test_import_needs_neither_matplotlib_nor_training():
    code = """
import sys
sys.modules["matplotlib"] = None  # so that importing it fails
from crossvit.interpretability import *
assert not [name for name in sys.modules if name.startswith("crossvit.training")]
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_overlay_is_brightest_where_the_values_are_highest():
    image = PIL.Image.new("RGB", (30, 20), (90, 90, 90))
    values = np.zeros((20, 30))
    values[5, 7] = 3
    pixels = np.asarray(overlay(image, values)).sum(axis=2)
    assert pixels.shape == (20, 30) and np.unravel_index(pixels.argmax(), pixels.shape) == (5, 7)
    assert len(np.unique(pixels)) == 2
    # A map may be zero everywhere, as when a head attends only to the class token; negative values count as zero
    assert np.array_equal(overlay(image, np.zeros((20, 30))), overlay(image, np.full((20, 30), -1.0)))
