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
"""Finds the images of a folder that look most like others to a CrossViT, and draws them side by side.

    python examples/retrieve.py --data photos --model my-crossvit --query dog.jpg cat.jpg
    python examples/retrieve.py --data photos --model my-crossvit    # images of the folder as queries
    python examples/retrieve.py                                      # held-out digits and the quickstart's model

Images are compared by the cosine between their `pooler_output`, the class tokens of both branches. Where the images
are in a folder per class, and with the digits, it also measures how many of the nearest are of the query's class. The
embeddings of a folder are kept in the cache of the library datasets until images or weights change.
"""

import signal


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a trace

import argparse
import hashlib
import io
import runpy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from command_line import load_checkpoint, quickstart_model, run
from sklearn.neighbors import NearestNeighbors
from transformers.utils import logging

from crossvit.interpretability.plotting import BLUE, ORANGE, Picture, draw_rows, save_figure
from crossvit.training.errors import CommandError, ImageDatasetError
from crossvit.training.image_files import read_image


QUICKSTART_SCRIPT = Path(__file__).with_name("quickstart.py")
MAX_ROWS = 8  # of the picture
THUMBNAIL = (240, 240)  # pixels, at most


def list_images(folder: str) -> datasets.Dataset:
    """The image files in a folder and those in it, and the names of the folders they are in."""
    root = Path(folder)
    if not root.is_dir():
        raise CommandError(f"--data {folder}: no such folder")
    suffixes = PIL.Image.registered_extensions()
    files = sorted(
        file
        for file in root.rglob("*")
        if file.suffix.lower() in suffixes and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not files:
        raise CommandError(f"--data {folder}: no images in it; their names end with .jpg, .png and the like")
    stamps = [file.stat() for file in files]
    return datasets.Dataset.from_dict(
        {
            "path": [str(file) for file in files],
            "bytes": [None] * len(files),
            "label": ["" if file.parent == root else str(file.parent.relative_to(root)) for file in files],
            "changed": [f"{stamp.st_mtime_ns} {stamp.st_size}" for stamp in stamps],  # for the cache
        }
    )


def held_out_digits() -> datasets.Dataset:
    """The quickstart's, which its model was not trained with."""
    digits = runpy.run_path(str(QUICKSTART_SCRIPT))["load_datasets"]()[1]
    contents = []
    for image in digits.images:
        image.save(content := io.BytesIO(), format="PNG")
        contents.append(content.getvalue())
    names = [f"digit {number}" for number in range(len(contents))]
    return datasets.Dataset.from_dict({"path": names, "bytes": contents, "label": list(map(str, digits.labels))})


class Embedder:
    """Images to the `pooler_output` of a model: (images, sum(embed_dim)), of length one."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval().base_model, processor

    def process(self, image: PIL.Image.Image) -> torch.Tensor:
        return self.processor(image, return_tensors="pt").pixel_values

    @torch.inference_mode()
    def __call__(self, pixel_values: list[torch.Tensor]) -> np.ndarray:
        if any(tensor.shape != pixel_values[0].shape for tensor in pixel_values):
            raise CommandError("the image processor must make images of one size: set `do_center_crop`")
        batch = torch.cat(pixel_values).to(self.model.device, self.model.dtype)
        return torch.nn.functional.normalize(self.model(batch).pooler_output.float()).cpu().numpy()

    def embed_rows(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Rows of encoded images; one that cannot be read has an error instead of an embedding."""
        pixel_values, errors = [], []
        for path, content in zip(rows["path"], rows["bytes"]):
            try:
                pixel_values.append(self.process(read_image({"path": path, "bytes": content})))
                errors.append("")
            except ImageDatasetError as error:
                errors.append(str(error))
        embeddings = iter(self(pixel_values).tolist() if pixel_values else [])
        return {"embedding": [None if error else next(embeddings) for error in errors], "error": errors}

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.processor.to_dict()).encode())
        for tensor in self.model.state_dict().values():
            digest.update(tensor.cpu().view(torch.uint8).numpy())
        return digest.hexdigest()


def index_images(images: datasets.Dataset, embed: Embedder, batch_size: int) -> datasets.Dataset:
    """The images that can be read, with their embeddings."""
    # A cache file by name, as rows that come from no file have none of their own
    content = hashlib.sha256(repr(images.to_dict()).encode()).hexdigest()
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "crossvit_embeddings"
    cache.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {**images.features, "embedding": datasets.List(datasets.Value("float32")), "error": datasets.Value("string")}
    )
    images = images.map(
        embed.embed_rows,
        batched=True,
        batch_size=batch_size,
        features=features,
        cache_file_name=str(cache / f"{content[:32]}-{embed.fingerprint()[:32]}.arrow"),
        desc="Embedding",
    )
    for error in filter(None, images["error"]):
        print(f"left out: {error}")
    images = images.select([row for row, error in enumerate(images["error"]) if not error])
    if len(images) < 2:
        raise CommandError("fewer than two images that can be read: nothing to compare")
    return images


def thumbnail(image: PIL.Image.Image) -> PIL.Image.Image:
    image.thumbnail(THUMBNAIL)
    return image


def name_of(path: str) -> str:
    return Path(path).name[-24:]


def precision(labels: np.ndarray, nearest: np.ndarray) -> float:
    """The share of the nearest images (images, k) that are of the class of their query."""
    return float((labels[nearest] == labels[:, None]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images to search; default: the held-out digits of the quickstart")
    parser.add_argument("--model", help="folder or Hub id of a CrossViT; default: the quickstart's")
    parser.add_argument("--query", nargs="+", default=[], metavar="FILE", help="find images like these")
    parser.add_argument("--nearest", type=int, default=5, metavar="K", help="images to find; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=32, help="images at once; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("outputs/retrieve.png"), help="default: %(default)s")
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.nearest < 1 or args.batch_size < 1:
        raise CommandError(f"--nearest {args.nearest} --batch_size {args.batch_size}: of each, not so few")

    queries = [read_image({"path": path, "bytes": None}) for path in args.query]  # A typo should not cost a training
    images = list_images(args.data) if args.data else held_out_digits()
    model, processor = load_checkpoint(args.model or quickstart_model(QUICKSTART_SCRIPT))
    embed = Embedder(model, processor)
    images = index_images(images, embed, args.batch_size)
    labels = np.array(images["label"])
    neighbors = NearestNeighbors(n_neighbors=min(args.nearest, len(images) - 1), metric="cosine")
    neighbors.fit(np.array(images["embedding"]))

    if queries:
        distances, nearest = neighbors.kneighbors(np.concatenate([embed([embed.process(query)]) for query in queries]))
        for path, row in zip(args.query, nearest):
            print(path, *(images[number]["path"] for number in row.tolist()), sep="  ")
        first = [Picture(thumbnail(query), name_of(path)) for query, path in zip(queries, args.query)][:MAX_ROWS]
        shown, expected = list(range(len(first))), [None] * len(first)
    else:
        distances, nearest = neighbors.kneighbors()  # of each image among the others
        shown = np.linspace(0, len(images) - 1, min(MAX_ROWS, len(images))).astype(int).tolist()
        first = [Picture(thumbnail(read_image(images[row])), name_of(images[row]["path"])) for row in shown]
        expected = [None] * len(first)
        if len(set(labels)) > 1:
            expected = labels[shown].tolist()
            print(
                f"{precision(labels, nearest):.1%} of the {nearest.shape[1]} nearest images of {len(images):,} images"
                " are of the same class"
            )

    rows = []
    for picture, row, label in zip(first, shown, expected):
        rows.append([picture])
        for distance, number in zip(distances[row], nearest[row].tolist()):
            title = f"{name_of(images[number]['path'])}\ncosine {1 - distance:.3f}"
            color = label and (BLUE if labels[number] == label else ORANGE)
            rows[-1].append(Picture(thumbnail(read_image(images[number])), title, color=color))
    save_figure(draw_rows(rows), args.output)
    print(f"Drew {len(rows)} images and their nearest in {args.output}")


if __name__ == "__main__":
    run(main)
