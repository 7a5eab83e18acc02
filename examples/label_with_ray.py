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
"""Labels any number of images with a CrossViT on Ray Data, on one machine or a cluster.

python examples/label_with_ray.py photos --model outputs/photos --output outputs/labels
python examples/label_with_ray.py "s3://bucket/photos/*.jpg" --output s3://bucket/labels --embeddings --address auto

The output is Parquet files with the columns path, labels and scores (the five best), embedding (with --embeddings:
`pooler_output` in float16) and error (why an image cannot be read). A second run writes only what is missing.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from common.command_line import add_model_options, load_checkpoint, positive_int, run_command
from common.errors import CommandError
from common.images import find_files, image_suffixes
from common.inference import best_labels, load_model, prepare


def find_labelled(output: str) -> set[str]:
    """The paths in the files of earlier runs. Incomplete files are renamed."""
    system, folder = fsspec.core.url_to_fs(output)
    labelled = set()
    for file in system.glob(f"{folder}/*.parquet"):
        try:
            with system.open(file) as opened:
                labelled.update(pq.ParquetFile(opened).read(["path"])["path"].to_pylist())
        except pa.ArrowInvalid:
            print(f"{file} is incomplete and is renamed")
            system.mv(file, f"{folder}/_{Path(file).stem}.incomplete")  # readers of folders skip a leading "_"
    return labelled


def read_rows(batch: dict[str, Any], column: str, batch_size: int, labelled: Any) -> Iterator[dict[str, list[Any]]]:
    """The encoded images of Parquet files that are not labelled yet, each with the path FILE#ROW."""
    labelled = ray.get(labelled)
    for file in batch["path"]:
        with fsspec.open(file, "rb") as opened:
            first = 0
            for rows in pq.ParquetFile(opened).iter_batches(batch_size, columns=[column]):
                images = {f"{file}#{row}": image for row, image in enumerate(rows[column].to_pylist(), start=first)}
                first += len(images)
                if missing := {path: image for path, image in images.items() if path not in labelled}:
                    # `datasets` stores the bytes of an image and its path
                    encoded = [image["bytes"] if isinstance(image, dict) else image for image in missing.values()]
                    yield {"path": list(missing), "bytes": encoded}


def prepare_images(batch: dict[str, Any], processor: Any) -> dict[str, Any]:
    """The path, `pixel_values` and error of each image."""
    contents = batch.get("bytes", [None] * len(batch["path"]))
    images = [{"bytes": content, "path": path} for content, path in zip(contents, batch["path"])]
    with ThreadPoolExecutor() as pool:  # one by one, they would wait for a network
        pixel_values, errors = prepare(images, processor, pool.map)
    return {"path": batch["path"], "pixel_values": pixel_values.numpy(), "error": [error or "" for error in errors]}


class Labeller:
    """An actor, which loads the model once."""

    def __init__(self, args: argparse.Namespace):
        self.with_embeddings = args.embeddings
        self.model, _ = load_model(args)

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        pixel_values = torch.from_numpy(batch["pixel_values"]).to(self.model.device).to(self.model.dtype)
        embeddings = self.model.base_model(pixel_values).pooler_output
        labels, scores = best_labels(self.model.classifier(embeddings).mean(dim=1), self.model.config)
        names = [[self.model.config.id2label[label] for label in row] for row in labels.tolist()]
        failed = batch["error"] != ""
        columns = {
            "path": pa.array(batch["path"], pa.string()),
            "labels": pa.array(names, pa.list_(pa.string()), mask=failed),
            "scores": pa.array(scores.tolist(), pa.list_(pa.float32()), mask=failed),
        }
        if self.with_embeddings:
            columns["embedding"] = pa.array([*embeddings.half().cpu().numpy()], pa.list_(pa.float16()), mask=failed)
        return pa.table({**columns, "error": pa.array(batch["error"], pa.string(), mask=~failed)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="folder, glob or URL of images, or of Parquet files with encoded images")
    add("--output", required=True, help="folder or URL for Parquet files")
    add("--embeddings", action="store_true", help="write the embedding of each image, too")
    add("--column", default="image", help="column of images in Parquet files; default: %(default)s")
    add("--address", default="local", help="address of a Ray cluster, or auto; default: start Ray on this machine")
    add("--num_actors", type=positive_int, default=1, help="copies of the model; default: %(default)s")
    add("--num_cpus", type=float, default=0.5, help="CPUs per actor; default: %(default)s")
    add("--num_gpus", type=float, default=0, help="GPUs per actor, or a fraction of one; default: %(default)s")
    add_model_options(parser)
    args = parser.parse_args()
    args.output = args.output if "://" in args.output else os.path.abspath(args.output)
    images, tables = (find_files(args.source, suffixes) for suffixes in (image_suffixes(), {".parquet"}))
    if bool(images) == bool(tables):
        raise CommandError(f"{args.source}: must have images or Parquet files, got {'both' if images else 'neither'}")
    _, processor = load_checkpoint(args.model)  # an error ends the command before Ray starts
    labelled = find_labelled(args.output)
    if missing := [file for file in images or tables if file not in labelled]:
        # Other machines need the code that is not installed there
        ray.init(args.address, runtime_env={"py_modules": [str(Path(__file__).with_name("common"))]})
        if args.address == "local" and args.num_actors * args.num_cpus > ray.cluster_resources()["CPU"] - 1:
            raise CommandError("--num_actors, --num_cpus: must leave one CPU for reading, or the run waits forever")
        size = 1 if tables else args.batch_size
        groups = [missing[start : start + size] for start in range(0, len(missing), size)]
        dataset: Any = ray.data.from_arrow([pa.table({"path": paths}) for paths in groups])
        if tables:
            options = {"column": args.column, "batch_size": args.batch_size, "labelled": ray.put(labelled)}
            dataset = dataset.map_batches(read_rows, fn_kwargs=options)
        dataset = dataset.map_batches(prepare_images, batch_size=args.batch_size, fn_kwargs={"processor": processor})
        dataset.map_batches(
            Labeller,
            batch_size=args.batch_size,
            zero_copy_batch=False,  # PyTorch warns of arrays that cannot be written to
            fn_constructor_args=[args],
            compute=ray.data.ActorPoolStrategy(size=args.num_actors),
            num_cpus=args.num_cpus,
            num_gpus=args.num_gpus,
        ).write_parquet(args.output, min_rows_per_file=5_000)
    print(f"Labels of all images are in {args.output}")


if __name__ == "__main__":
    run_command(main)
