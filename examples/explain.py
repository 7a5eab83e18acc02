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
"""Draws what a CrossViT takes an image for, and where it looks: each branch, each fusion, and the rollout of all.

    python examples/explain.py photo.jpg --model my-crossvit   # a folder or a model of the Hub
    python examples/explain.py digit.png                       # the quickstart's model, which is trained if need be

Maps are of the last layer of each branch in each stage, and the means of all heads; `AttentionMaps` has the others.
"""

import signal


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a trace

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
from command_line import load_checkpoint, quickstart_model, run
from transformers import ImageClassificationPipeline
from transformers.utils import logging

from crossvit.interpretability.attention_maps import AttentionMap, AttentionMaps
from crossvit.interpretability.plotting import Picture, Scores, display_size, draw_rows, overlay, save_figure
from crossvit.training.image_files import read_image


def explain(maps: AttentionMaps, scores: list[dict]) -> list[list[Picture | Scores | None]]:
    """The rows of the picture: the image, its best labels and the rollout, then a row per stage."""
    size = display_size(maps.image)
    image = maps.image.resize(size[::-1])

    def draw(attention: AttentionMap, title: str) -> Picture:
        return Picture(overlay(image, attention.on_image(smooth=True, image_size=size)), title)

    seen = maps.region.align(np.ones((1, 1)), image_size=size)[..., None]
    bright = PIL.Image.fromarray((np.asarray(image) * (0.3 + 0.7 * seen)).astype(np.uint8))
    branches = range(maps.config.num_branches)
    first_row: list[Picture | Scores | None] = [
        Picture(bright, "what the model sees\nis bright"),
        Scores(scores, "top 5"),
    ]
    first_row += [None] * (2 * len(branches) - 3) + [draw(maps.rollout(), "rollout over\nall branches and stages")]
    rows = [first_row]
    for stage, (*depths, _) in enumerate(maps.config.depth):
        row: list[Picture | Scores | None] = []
        for branch in branches:
            grid = "{}x{} patches".format(*maps.grid_sizes[branch])
            title = f"stage {stage + 1}: branch {branch}\nlooks at its {grid}"
            has_layers = depths[branch] > 0
            row.append(draw(maps.self_attention(branch, stage), title) if has_layers else Picture(image, "no layers"))
        for branch in branches:
            visited = (branch + 1) % len(branches)
            title = f"stage {stage + 1}: branch {branch}\nvisits branch {visited}"
            row.append(draw(maps.cross_attention(branch, stage), title))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="file of the image")
    parser.add_argument("--model", help="folder or Hub id of a CrossViT; default: the quickstart's")
    parser.add_argument("--output", type=Path, default=Path("outputs/explain.png"), help="default: %(default)s")
    args = parser.parse_args()
    logging.disable_progress_bar()

    image = read_image({"bytes": None, "path": args.image})  # A typo should not cost a training
    model, processor = load_checkpoint(args.model or quickstart_model(Path(__file__).with_name("quickstart.py")))
    maps = AttentionMaps(model, processor, image)
    pipeline = ImageClassificationPipeline(model=model, image_processor=processor)
    scores = pipeline.postprocess(maps.outputs, top_k=5)
    save_figure(
        draw_rows(explain(maps, scores), heat="attention of the class token (1: the most in this map)"), args.output
    )
    print(args.image, *(f"{entry['label']} {entry['score']:.1%}" for entry in scores), sep="  ")
    print(f"Drew where {args.model or 'the model'} looks in {args.output}")


if __name__ == "__main__":
    run(main)
