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
"""Finds the images of a folder that are most similar to others for a CrossViT, and draws them side by side.

    python examples/retrieve.py --data photos --query dog.jpg cat.jpg
    python examples/retrieve.py --data photos --model outputs/quickstart   # images of the folder as queries

Images are compared by the cosine similarity of their `pooler_output`, the class tokens of all branches. Without
queries, it also measures how many of the nearest images are in the folder of the query. Embeddings are kept in the
cache of the library datasets until images or weights change.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import load_checkpoint, run


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
    import PIL.Image
    from datasets.fingerprint import Hasher
    from transformers.image_utils import load_image

    def embed_batch(batch: dict[str, list[str]]) -> dict[str, list]:
        readable, images = [], []
        for path in batch["path"]:
            try:
                images.append(load_image(PIL.Image.open(path)))
                readable.append(path)
            except Exception as error:  # of many types, by format
                print(f"left out {path}: {error}")
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
    parser.add_argument(
        "--model",
        default="timm/crossvit_15_dagger_240.in1k",
        help="folder or Hub id of a CrossViT; default: %(default)s",
    )
    parser.add_argument("--query", nargs="+", default=[], metavar="FILE", help="default: images of the folder")
    parser.add_argument("--nearest", type=int, default=5, metavar="K", help="images to find; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("outputs/retrieve.png"), help="default: %(default)s")
    args = parser.parse_args()
    if args.nearest < 1 or args.batch_size < 1:
        parser.error("--nearest and --batch_size must be at least 1")

    # After the options, as these imports take seconds
    import numpy as np
    import PIL.Image
    from sklearn.neighbors import NearestNeighbors
    from transformers.image_utils import load_image
    from transformers.utils import logging

    from crossvit.interpretability import Picture, draw_rows
    from crossvit.interpretability.plotting import BLUE, ORANGE
    from crossvit.training.errors import CommandError

    def picture(path: str, title: str, color: str | None = None) -> Picture:
        image = load_image(PIL.Image.open(path))
        image.thumbnail(THUMBNAIL)
        return Picture(image, title, color=color)

    logging.disable_progress_bar()
    suffixes = PIL.Image.registered_extensions()
    files = sorted(str(path) for path in args.data.rglob("*") if path.suffix.lower() in suffixes)
    queries = [load_image(PIL.Image.open(path)) for path in args.query]
    model, processor = load_checkpoint(args.model)
    model.eval()
    dataset = embed_files(files, model, processor, args.batch_size)
    if len(dataset) < 2:
        raise CommandError(f"--data {args.data}: must hold at least two images, found {len(dataset)}")
    found = list(dataset["path"])
    neighbors = NearestNeighbors(n_neighbors=min(args.nearest, len(found) - 1), metric="cosine")
    neighbors.fit(np.array(dataset["embedding"]))

    if queries:
        embedded = np.concatenate([embed([query], model, processor) for query in queries])
        distances, nearest = neighbors.kneighbors(embedded)
        query_files, shown, frames = args.query, list(range(len(queries))), False
        for path, row in zip(args.query, nearest):
            print(path, *(found[index] for index in row), sep="  ")
    else:
        distances, nearest = neighbors.kneighbors()  # of each image among the others
        query_files, shown = found, np.linspace(0, len(found) - 1, min(MAX_ROWS, len(found))).astype(int).tolist()
        folders = np.array([os.path.dirname(path) for path in found])
        frames = len(set(folders)) > 1
        if frames:
            share = (folders[nearest] == folders[:, None]).mean()
            print(f"{share:.1%} of the {nearest.shape[1]} nearest of {len(found):,} images are in the same folder")

    rows = []
    for query in shown[:MAX_ROWS]:
        path = query_files[query]
        rows.append([picture(path, Path(path).name[-24:])])
        for index, distance in zip(nearest[query], distances[query]):
            title = f"{Path(found[index]).name[-24:]}\ncosine {1 - distance:.3f}"
            same = os.path.dirname(found[index]) == os.path.dirname(path)
            rows[-1].append(picture(found[index], title, (BLUE if same else ORANGE) if frames else None))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_rows(rows).savefig(args.output)
    print(f"Drew {len(rows)} images and their nearest in {args.output}")


if __name__ == "__main__":
    run(main)
