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
"""Classifies images with a CrossViT: the five best labels of each, as lines or as a table.

    python examples/classify.py photo.jpg --model outputs/photos
    python examples/classify.py photos more/dog.jpg --output labels.csv      # folders with their subfolders, too

Files that cannot be read are reported and skipped.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.command_line import DEFAULT_MODEL, load_checkpoint, run_command
from common.errors import CommandError
from common.images import find_images, open_image


if TYPE_CHECKING:
    import PIL.Image


TOP = 5  # labels of each image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id of a CrossViT; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="CSV file for the results; default: lines on the standard output")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error("--batch_size must be at least 1")

    # After the options, as these imports take seconds
    from torch.utils.data import IterableDataset
    from tqdm import tqdm
    from transformers import pipeline

    model, processor = load_checkpoint(args.model)
    files = dict.fromkeys(file for path in args.paths for file in (find_images(path) if path.is_dir() else [path]))
    readable: list[Path] = []  # grows as the pipeline reads

    class Images(IterableDataset["PIL.Image.Image"]):  # a generator is read as a whole by transformers 5.10
        def __iter__(self) -> Iterator["PIL.Image.Image"]:
            for file in tqdm(files, "images"):
                try:
                    image = open_image(file)
                except CommandError as error:
                    tqdm.write(f"left out {error}", file=sys.stderr)
                else:
                    readable.append(file)
                    yield image

    classifier: Any = pipeline("image-classification", model=model, image_processor=processor, top_k=TOP)
    predictions = classifier(Images(), batch_size=args.batch_size)
    if args.output is None:
        for scores, file in zip(predictions, readable):
            tqdm.write("  ".join((str(file), *(f"{entry['label']} {entry['score']:.1%}" for entry in scores))))
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", encoding="utf-8", errors="surrogateescape", newline="") as output:
            table = csv.writer(output)
            places = range(1, min(TOP, model.config.num_labels) + 1)
            table.writerow(["file", *(name for place in places for name in (f"label_{place}", f"score_{place}"))])
            for scores, file in zip(predictions, readable):
                columns = (text for entry in scores for text in (entry["label"], f"{entry['score']:.6f}"))
                table.writerow([file, *columns])
    if not readable:
        raise CommandError(f"no image that can be read in {', '.join(map(str, args.paths))}")
    print(f"Classified {len(readable):,} of {len(files):,} images", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
