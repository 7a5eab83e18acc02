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
"""Tables of results, written row by row as CSV or Parquet."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


TABLE_SUFFIXES = (".csv", ".parquet")
ROW_GROUP = 10_000  # rows of a Parquet file that are written at once


@contextmanager
def open_table(path: Path, columns: dict[str, type]) -> Iterator[Callable[[list[Any]], None]]:
    """
    Creates a CSV or Parquet file with columns of text (`str`) or numbers (`float`), and yields a function that adds a
    row. Ctrl-C and errors leave a file with the rows so far. CSV files have six decimals.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            yield lambda row: writer.writerow(f"{value:.6f}" if isinstance(value, float) else value for value in row)
        return

    import pyarrow
    import pyarrow.parquet

    types = {str: pyarrow.string(), float: pyarrow.float32()}
    schema = pyarrow.schema({name: types[kind] for name, kind in columns.items()})
    rows: list[list[Any]] = []

    def write_row_group() -> None:
        parquet.write_table(pyarrow.Table.from_pylist([dict(zip(columns, row)) for row in rows], schema))
        rows.clear()

    def add(row: list[Any]) -> None:
        # Names of files that are not UTF-8 are legal, but not in Parquet
        rows.append(
            [value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value for value in row]
        )
        if len(rows) == ROW_GROUP:
            write_row_group()

    with pyarrow.parquet.ParquetWriter(path, schema) as parquet:
        try:
            yield add
        finally:
            write_row_group()
