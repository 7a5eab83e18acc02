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
"""Finds the images in a folder that a CrossViT considers most similar to others, and plots them side by side.

    python examples/retrieve.py --data photos --query dog.jpg cat.jpg
    python examples/retrieve.py --data photos --model outputs/photos   # images of the folder as queries

Images are compared by the cosine similarity of their `pooler_output`, the class tokens of all branches. If there are
several folders, their names are the labels of the images. Without queries, the command also measures how many of the
nearest images have the same label as their query. Embeddings are kept in the cache of the datasets library until the
images or weights change.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.command_line import add_predict_options, positive_int, run_command
from common.errors import CommandError
from common.images import find_images, open_image


if TYPE_CHECKING:
    import torch


MAX_ROWS = 8  # of the picture
THUMBNAIL = (240, 240)  # pixels, at most


def embed(model: Any, pixel_values: "torch.Tensor") -> "tuple[torch.Tensor]":
    """The normalized `pooler_output` (images, sum(embed_dim)) of images."""
    from torch.nn.functional import normalize

    return (normalize(model.base_model(pixel_values).pooler_output.float()),)


def embed_files(paths: list[Path], model: Any, processor: Any, args: argparse.Namespace) -> tuple[list[str], Any]:
    """The paths and the embeddings (images, sum(embed_dim)) of the image files that can be read."""
    import datasets
    import numpy as np
    from common.inference import predict
    from datasets.fingerprint import Hasher

    times = [os.stat(path).st_mtime_ns for path in paths]
    key = Hasher.hash((paths, times, processor.to_dict(), model.state_dict()))
    cache = Path(datasets.config.HF_DATASETS_CACHE, "crossvit_embeddings", f"{key}.npz")
    if not cache.is_file():
        rows = [
            (str(path), np.float32(embedding)) for path, embedding in predict(embed, model, processor, paths, args)
        ]
        cache.parent.mkdir(parents=True, exist_ok=True)
        incomplete = cache.with_suffix(".incomplete.npz")
        np.savez(incomplete, paths=[path for path, _ in rows], embeddings=[embedding for _, embedding in rows])
        incomplete.replace(cache)
    with np.load(cache) as stored:
        return stored["paths"].tolist(), stored["embeddings"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="images to search")
    parser.add_argument("--query", nargs="+", default=[], metavar="FILE", help="default: images of the folder")
    add = parser.add_argument
    add("--nearest", type=positive_int, default=5, metavar="K", help="images to find; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("outputs/retrieve.png"), help="default: %(default)s")
    add_predict_options(parser)
    args = parser.parse_args()

    # After the options, as these imports take seconds
    import numpy as np
    from common.inference import load_model, predict
    from sklearn.neighbors import NearestNeighbors

    from crossvit.interpretability import ImageCell, draw_rows
    from crossvit.interpretability.plotting import BLUE, ORANGE, shorten

    for path in args.query:
        open_image(path)  # an error ends the command before the work begins
    files = {path.resolve(): path for path in find_images(args.data)}  # once, even if links lead to them
    model, processor = load_model(args)
    found, embeddings = embed_files(list(files.values()), model, processor, args)
    if len(found) < 2:
        raise CommandError(f"--data {args.data}: must hold at least two images, found {len(found)}")
    places = {Path(path).resolve(): index for index, path in enumerate(found)}
    neighbors = NearestNeighbors(n_neighbors=min(args.nearest, len(found) - 1), metric="cosine")
    neighbors.fit(embeddings)
    folders = {Path(path).parent for path in found}
    labels = {folder.name for folder in folders if folder != args.data} if len(folders) > 1 else set()

    def label(path: str) -> str:
        """The name of the folder of an image if that is a label, else ""."""
        place = places.get(Path(path).resolve())  # a link from elsewhere has the label of the image in the data
        folder = Path(path if place is None else found[place]).absolute().parent
        return folder.name if folder.name in labels else ""

    def others(path: str, indices: Any, distances: Any) -> list[tuple[str, float]]:
        """The nearest images but for the image itself, with their cosines."""
        place = places.get(Path(path).resolve())
        pairs = [(found[index], 1 - distance) for index, distance in zip(indices, distances) if index != place]
        return pairs[: args.nearest]

    def picture(path: str, cosine: str = "", color: str | None = None) -> ImageCell:
        image = open_image(path)
        image.thumbnail(THUMBNAIL)
        lines = (shorten(label(path)), shorten(Path(path).name), cosine)
        return ImageCell(image, "\n".join(line for line in lines if line), color=color)

    if args.query:
        embedded = np.array([row for _, row in predict(embed, model, processor, args.query, args)])
        # One more than asked for, in case the query is among them
        distances, nearest = neighbors.kneighbors(embedded, min(args.nearest + 1, len(found)))
        results = [(path, others(path, *row)) for path, *row in zip(args.query, nearest, distances)]
        for path, similar in results:
            print(path, *(other for other, _ in similar), sep="  ")
    else:
        distances, nearest = neighbors.kneighbors()  # of each image among the others
        if labels:
            own = np.array([label(path) for path in found])
            share = (own[nearest] == own[:, None]).mean()
            print(f"Precision@{nearest.shape[1]} over {len(found):,} images: {share:.1%}")
        shown = np.linspace(0, len(found) - 1, min(MAX_ROWS, len(found))).astype(int)
        results = [(found[index], others(found[index], nearest[index], distances[index])) for index in shown]

    rows = []
    for path, similar in results[:MAX_ROWS]:
        rows.append([picture(path)])
        for other, cosine in similar:
            color = BLUE if label(other) == label(path) else ORANGE
            rows[-1].append(picture(other, f"cosine {cosine:.3f}", color if label(path) else None))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_rows(rows).savefig(args.output)
    print(f"Drew {len(rows)} images and their nearest in {args.output}")


if __name__ == "__main__":
    run_command(main)
