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
"""Finds the images in a folder that a CrossViT considers most similar to others, and draws them side by side.

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

from common.command_line import DEFAULT_MODEL, load_checkpoint, run_command
from common.errors import CommandError
from common.images import find_images, open_image


if TYPE_CHECKING:
    import datasets


MAX_ROWS = 8  # of the picture
THUMBNAIL = (240, 240)  # pixels, at most


def embed(images: list[Any], model: Any, processor: Any) -> Any:
    """The normalized `pooler_output` (images, sum(embed_dim)) of images."""
    import torch

    with torch.inference_mode():
        pixel_values = processor(images, return_tensors="pt").pixel_values
        pooled = model.base_model(pixel_values.to(model.device, model.dtype)).pooler_output
    return torch.nn.functional.normalize(pooled.float()).cpu().numpy()


def embed_files(paths: list[str], model: Any, processor: Any, batch_size: int) -> "datasets.Dataset":
    """The paths and embeddings of the image files that can be read; the others are named."""
    import datasets
    from datasets.fingerprint import Hasher

    def embed_batch(batch: dict[str, list[str]]) -> dict[str, list]:
        readable, images = [], []
        for path in batch["path"]:
            try:
                images.append(open_image(path))
                readable.append(path)
            except CommandError as error:
                print(f"left out {error}")
        return {"path": readable, "embedding": embed(images, model, processor) if images else []}

    times = [os.stat(path).st_mtime_ns for path in paths]
    key = Hasher.hash((paths, times, processor.to_dict(), model.state_dict()))
    cache = Path(datasets.config.HF_DATASETS_CACHE, "crossvit_embeddings")
    cache.mkdir(parents=True, exist_ok=True)
    return datasets.Dataset.from_dict({"path": paths}).map(
        embed_batch,
        batched=True,
        batch_size=batch_size,
        features=datasets.Features(
            {"path": datasets.Value("string"), "embedding": datasets.List(datasets.Value("float32"))}
        ),
        new_fingerprint=key,
        cache_file_name=str(cache / f"{key}.arrow"),
        desc="Embedding",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="images to search")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id of a CrossViT; default: %(default)s")
    parser.add_argument("--query", nargs="+", default=[], metavar="FILE", help="default: images of the folder")
    parser.add_argument("--nearest", type=int, default=5, metavar="K", help="images to find; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("outputs/retrieve.png"), help="default: %(default)s")
    args = parser.parse_args()
    if args.nearest < 1 or args.batch_size < 1:
        parser.error("--nearest and --batch_size must be at least 1")

    # After the options, as these imports take seconds
    import numpy as np
    from sklearn.neighbors import NearestNeighbors

    from crossvit.interpretability import ImageCell, draw_rows
    from crossvit.interpretability.plotting import BLUE, ORANGE

    files = {path.resolve(): str(path) for path in find_images(args.data)}  # once, even if links lead to them
    queries = [open_image(path) for path in args.query]
    model, processor = load_checkpoint(args.model)
    model.eval()
    dataset = embed_files(list(files.values()), model, processor, args.batch_size)
    if len(dataset) < 2:
        raise CommandError(f"--data {args.data}: must hold at least two images, found {len(dataset)}")
    found = list(dataset["path"])
    places = {Path(path).resolve(): index for index, path in enumerate(found)}
    neighbors = NearestNeighbors(n_neighbors=min(args.nearest, len(found) - 1), metric="cosine")
    neighbors.fit(np.array(dataset["embedding"]))
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
        lines = (label(path)[:24], Path(path).name[-24:], cosine)
        return ImageCell(image, "\n".join(line for line in lines if line), color=color)

    if args.query:
        embedded = np.concatenate([embed([query], model, processor) for query in queries])
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
