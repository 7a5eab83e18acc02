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
    python examples/classify.py photos --output labels.parquet --batch_size 256 --dtype bfloat16 --compile   # on a GPU

Files that cannot be read are reported and skipped.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common.command_line import add_predict_options, run_command
from common.errors import CommandError
from common.images import find_images
from common.tables import TABLE_SUFFIXES, open_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--output", type=Path, help="CSV or Parquet file; default: lines on the standard output")
    add_predict_options(parser)
    args = parser.parse_args()
    if args.output and args.output.suffix not in TABLE_SUFFIXES:
        parser.error(f"--output {args.output}: must end in {' or '.join(TABLE_SUFFIXES)}")

    # After the options, as these imports take seconds
    from common.inference import TOP, best_labels, load_model, predict
    from torch import Tensor
    from tqdm import tqdm

    def classify(model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return best_labels(model(pixel_values).logits, model.config)

    model, processor = load_model(args)
    paths = list(
        dict.fromkeys(file for path in args.paths for file in (find_images(path) if path.is_dir() else [path]))
    )
    columns: dict[str, type] = {"file": str}
    for place in range(1, min(TOP, model.config.num_labels) + 1):
        columns |= {f"label_{place}": str, f"score_{place}": float}
    classified = 0
    with open_table(args.output, columns) if args.output else nullcontext() as add_row:
        for path, labels, scores in predict(classify, model, processor, paths, args):
            names = [model.config.id2label[label] for label in labels]
            if add_row is None:
                tqdm.write("  ".join((str(path), *(f"{name} {score:.1%}" for name, score in zip(names, scores)))))
            else:
                add_row([str(path), *(value for pair in zip(names, scores) for value in pair)])
            classified += 1
    if not classified:
        raise CommandError(f"no image that can be read in {', '.join(map(str, args.paths))}")
    print(f"Classified {classified:,} of {len(paths):,} images", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
