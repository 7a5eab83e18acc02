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
"""Plots the predictions of a CrossViT for an image, and what its class tokens attend to in each stage.

    python examples/explain.py photo.jpg                              # with published weights
    python examples/explain.py photo.jpg --model outputs/photos       # or another folder or model of the Hub
    python examples/explain.py photo.jpg mask.png --model folder      # with a separate image for each branch

Self-attention maps are those of the last layer of each branch in each stage. All are averaged over the heads;
`AttentionMaps` gives access to every layer and head. With an image for each branch, every map is drawn on the image
that is attended to, and attention rollout on each of them.
"""

import argparse
from pathlib import Path
from typing import Any

from common.command_line import DEFAULT_MODEL, load_checkpoint, run_command
from common.images import open_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="image", help="image file, or one for each branch of the model")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub ID of a CrossViT; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("outputs/explain.png"), help="default: %(default)s")
    args = parser.parse_args()

    # After the options, as these imports take seconds
    import numpy as np
    import PIL.Image
    from transformers import ImageClassificationPipeline

    from crossvit.interpretability import (
        AttentionMap,
        AttentionMaps,
        ImageCell,
        ScoreCell,
        display_size,
        draw_attention,
        draw_rows,
    )

    images = [open_image(path) for path in args.images]
    model, processor = load_checkpoint(args.model)
    maps = AttentionMaps(model, processor, images if len(images) > 1 else images[0])
    scores = ImageClassificationPipeline(model=model, image_processor=processor).postprocess(maps.outputs, top_k=5)
    print(*args.images, *(f"{entry['label']} {entry['score']:.1%}" for entry in scores), sep="  ")

    def draw_input(branch: int, title: str) -> ImageCell:
        image = maps.images[branch]
        height, width = display_size(image)
        crop = maps.crops[branch].align(np.ones((1, 1)), image_size=(height, width))[..., None]
        bright_crop = np.asarray(image.resize((width, height))) * (0.3 + 0.7 * crop)
        return ImageCell(PIL.Image.fromarray(bright_crop.astype(np.uint8)), f"{title}\n(bright: center crop)")

    def draw(attention: AttentionMap, title: str, label: str = "", branch: int | None = None) -> ImageCell:
        image = maps.images[min(attention.patches) if branch is None else branch]
        picture, peak = draw_attention(image, attention, branch)
        return ImageCell(picture, f"{title}, {peak}", label)

    branches = range(model.config.num_branches)
    columns = 2 * len(branches)
    rows: list[list[Any]]
    if len(images) == 1:
        rollout = draw(maps.rollout(), "attention rollout\nover all stages")
        rows = [[draw_input(0, "input"), ScoreCell(scores, "top 5"), *[None] * (columns - 3), rollout]]
    else:
        inputs = [draw_input(branch, f"input of branch {branch}") for branch in branches]
        rows = [[*inputs, ScoreCell(scores, "top 5"), *[None] * (len(branches) - 1)], []]
        for branch in branches:
            title = f"attention rollout\nto the input of branch {branch}"
            rows[-1] += [draw(maps.rollout(), title, branch=branch), None]
    for stage in range(len(model.config.depth)):
        row: list[Any] = []
        for title, attention in maps.class_token_maps(stage).items():
            row.append(draw(attention, title, "" if row else f"stage {stage + 1}"))
        rows.append(row + [None] * (columns - len(row)))

    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_rows(rows, heat=True).savefig(args.output)
    print(f"Drew the attention maps in {args.output}")


if __name__ == "__main__":
    run_command(main)
