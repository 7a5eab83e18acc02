"""Measures our CrossViT beside timm's, and beside the same in Transformers' timm wrapper, of the same weights.

    python tests/benchmarks/benchmark.py --quick       # ten minutes on two cores
    python tests/benchmarks/benchmark.py               # an hour or two
    python tests/benchmarks/benchmark.py --variants crossvit_15 --tasks inference --batch_sizes 1 8 --modes eager
    python tests/benchmarks/benchmark.py --from_json outputs/benchmark/benchmark.json     # the report once more

It leaves benchmark.json with all that was measured, benchmark.md with tables and goals, and benchmark.png in --output.
The first of them is written after each cell of the table, so that a run may be ended at any time.
"""

import signal
import sys
from pathlib import Path


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a trace
    TESTS = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(TESTS), str(TESTS.parent / "conversion"), str(TESTS.parent / "examples")]

import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from benchmarks.contenders import CONTENDERS, WEIGHTS_DTYPE, Cell
from benchmarks.measuring import count_flops, find_largest_batch, machine, measure, measure_limits
from benchmarks.report import describe, write_report
from command_line import make_parser, parse, reason, run
from reference import VARIANTS
from timm_reference import timm_variant
from transformers.utils import logging

from crossvit.training.errors import CommandError


TASKS = ("inference", "training", "loading", "preprocessing")
LARGEST = "largest"
SMALL_VARIANTS = ("crossvit_tiny", "crossvit_9", "crossvit_9_dagger")
# Compiling takes minutes: the (batch size, dtype) of these modes, by device, unless --modes asks for more
SHORT_MODES = {
    ("cpu", "compiled"): (8, "float32"),
    ("cuda", "compiled"): (256, "bfloat16"),
    ("cuda", "cuda_graphs"): (1, "bfloat16"),
    ("cuda", "checkpointing"): (256, "bfloat16"),
}
CELL_SECONDS, QUICK_CELL_SECONDS = 15.0, 2.5  # for the rounds of a cell
QUICK_SECONDS = 8 * 60  # after which a quick run begins no cell


@dataclass
class BenchmarkArguments:
    """What to measure, and how."""

    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"choices": VARIANTS, "help": "Default: all."}
    )
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"choices": TASKS, "help": "Default: all."})
    batch_sizes: list[str] | None = field(
        default=None, metadata={"help": f"Numbers or, on a GPU, {LARGEST}. Default: 1 8, on a GPU 256 {LARGEST} too."}
    )
    dtypes: list[str] = field(
        default_factory=lambda: list(WEIGHTS_DTYPE), metadata={"choices": WEIGHTS_DTYPE, "help": "Default: all."}
    )
    modes: list[str] | None = field(
        default=None,
        metadata={"choices": CONTENDERS, "help": "Default: eager for all, the others only where they tell most."},
    )
    rounds: int = field(default=20, metadata={"help": "Of all contenders of a cell, or what it has time for."})
    threads: int = field(default=os.cpu_count() or 1, metadata={"help": "Of the processor."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu",
        metadata={"choices": ["cpu", "cuda"], "help": "Default: a GPU if there is one."},
    )
    memory: bool = field(default=True, metadata={"help": "Measure memory too, on a CPU in processes of its own."})
    quick: bool = field(default=False, metadata={"help": "The most telling cells, within ten minutes."})
    output: str = field(default="outputs/benchmark", metadata={"help": "Folder for what is found."})
    from_json: str | None = field(default=None, metadata={"help": "Measure nothing, report what is in this file."})

    def __post_init__(self):
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no GPU")
        on_gpu = self.device == "cuda"
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        self.batch_sizes = self.batch_sizes or (["1", "8", "256", LARGEST] if on_gpu else ["1", "8"])
        for size in self.batch_sizes:
            if not (size.isdecimal() and int(size) > 0) and not (size == LARGEST and on_gpu):
                raise ValueError(f"--batch_sizes: positive numbers or, on a GPU, {LARGEST}, got {size!r}")
        if not on_gpu and (gpu_modes := {"cuda_graphs", "checkpointing"} & set(self.modes or ())):
            raise ValueError(f"--modes {' '.join(sorted(gpu_modes))}: only on a GPU")


def plan(args: BenchmarkArguments) -> Iterator[Cell]:
    """The cells to measure, those of a variant together."""
    preprocessed = set()
    for variant in args.variants:
        image_sizes = (VARIANTS[variant]["preprocessing"][name] for name in ("input", "resize_shortest_edge"))
        if "preprocessing" in args.tasks and (key := tuple(image_sizes)) not in preprocessed:
            preprocessed.add(key)
            yield Cell(variant, "preprocessing", batch_size=32)
        if "loading" in args.tasks and (variant in SMALL_VARIANTS or not args.quick):
            yield Cell(variant, "loading", batch_size=1)
        for task in ("inference", "training"):
            for dtype in args.dtypes:
                for size in args.batch_sizes:
                    for mode in args.modes or CONTENDERS:
                        cell = Cell(variant, task, 0 if size == LARGEST else int(size), dtype, mode, args.device)
                        if task in args.tasks and is_worth_measuring(cell, args):
                            yield cell


def is_worth_measuring(cell: Cell, args: BenchmarkArguments) -> bool:
    if args.modes is None and cell.mode != "eager":
        if (cell.batch_size, cell.dtype) != SHORT_MODES.get((cell.device, cell.mode)):
            return False
    if (cell.mode == "checkpointing" and cell.task == "inference") or (
        cell.mode == "cuda_graphs" and not cell.batch_size
    ):
        return False
    if not args.quick:
        return True
    if cell.mode != "eager":
        return cell.variant == SMALL_VARIANTS[0] and cell.task == "inference"
    if cell.task == "training":
        return cell.variant in SMALL_VARIANTS and cell.batch_size == 8 and cell.dtype == "float32"
    return cell.batch_size > 0 and cell.dtype != "autocast"


def measure_all(args: BenchmarkArguments, path: Path) -> dict[str, Any]:
    """Measures all cells; leaves what was measured so far in `path` at any time."""
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    start = time.monotonic()
    cells = list(plan(args))
    dtypes = sorted({cell.dtype for cell in cells})
    results: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "device": args.device,
        "limits": measure_limits(dtypes, args.device),
        "left_out": 0,
        "cells": [],
    }
    reference, flops, largest = None, {}, {}
    for number, cell in enumerate(cells):
        if args.quick and time.monotonic() - start > QUICK_SECONDS:
            results["left_out"] = len(cells) - number
            break
        if number == 0 or cell.variant != cells[number - 1].variant:
            torch.manual_seed(0)
            reference = timm_variant(VARIANTS[cell.variant])
        record: dict[str, Any] = {}
        try:
            if cell.batch_size == 0:
                key = (cell.variant, cell.task, cell.dtype)
                if key not in largest:
                    largest[key] = find_largest_batch(cell, reference)
                cell = replace(cell, batch_size=largest[key])
                record["largest"] = True
            if cell.task in ("inference", "training"):
                if (cell.variant, cell.task) not in flops:
                    flops[cell.variant, cell.task] = {
                        name: count_flops(name, cell, reference) for name in ("crossvit", "timm")
                    }
                record["flops"] = flops[cell.variant, cell.task]
            seconds = QUICK_CELL_SECONDS if args.quick else CELL_SECONDS
            with_memory = args.memory and (not args.quick or cell.task == "training")
            record |= measure(cell, reference, args.rounds, seconds, with_memory)
        except (RuntimeError, MemoryError) as error:  # out of memory, no compiler, or not the same logits
            record["error"] = reason(error)[:300]
        results["cells"].append({**asdict(cell), **record})
        results["seconds"] = time.monotonic() - start
        write_atomically(path, json.dumps(results, indent=1))
        print(f"[{number + 1}/{len(cells)}] {cell}: {describe(results['cells'][-1])}", file=sys.stderr, flush=True)
    return results


def write_atomically(path: Path, text: str) -> None:
    incomplete = path.with_suffix(".incomplete")
    incomplete.write_text(text, encoding="utf-8")
    incomplete.replace(path)


def main() -> None:
    (args,) = parse(make_parser(BenchmarkArguments, __doc__, {}))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if args.from_json is None:
        results = measure_all(args, output / "benchmark.json")
    else:
        try:
            results = json.loads(Path(args.from_json).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CommandError(f"--from_json {args.from_json}: {reason(error)}") from error
    print(write_report(results, output))
    if failed := sum("error" in record for record in results["cells"]):
        raise CommandError(f"{failed} of {len(results['cells'])} cells failed, see {output / 'benchmark.md'}")


if __name__ == "__main__":
    run(main)
