"""Compares our CrossViT with timm's, plain and in Transformers' TimmWrapper: same weights, same work, interleaved.

    python tests/benchmarks/benchmark.py --quick
    python tests/benchmarks/benchmark.py --variants crossvit_15 --tasks inference --batch_sizes 1 8 --modes eager

README.md in this folder describes the method, the options and the table.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


EXAMPLES = Path(__file__).parents[2] / "examples"
VARIANTS_FILE = Path(__file__).parents[2] / "conversion" / "variants.json"
VARIANTS = {variant["name"]: variant for variant in json.loads(VARIANTS_FILE.read_text(encoding="utf-8"))}
TASKS = (
    *("inference", "training", "memory", "preprocessing", "reading", "streaming"),
    *("loading", "pipeline", "classifying", "startup"),
)
DTYPES = ("float32", "bfloat16")
MODES = ("eager", "compiled", "reduce-overhead", "checkpointing")
PREPROCESSED_IMAGES = 32
# What does not depend on the model: backends of our image processor; augmentation, and files of a stream, each read in
# the main process or by a worker
PREPROCESSING_MODES = {
    "preprocessing": ("torchvision", "pil"),
    "reading": [f"{name}{where}" for where in ("", ", worker") for name in ("fine-tuning", "recipe", "evaluation")],
    "streaming": [f"{name}{where}" for where in ("", ", worker") for name in ("folder", "parquet")],
}
CLASSIFYING_MODES = [f"{command}{where}" for command in ("classify", "evaluate") for where in ("", ", 2 workers")]
QUICK = {"variants": ["crossvit_tiny", "crossvit_9_dagger"], "batch_sizes": [8], "modes": ["eager"], "seconds": 2.0}

# A cell, by its first columns of the table, is what all contenders do, interleaved
CELL = ("variant", "task", "batch_size", "dtype", "mode", "attn_implementation")
CONTENDERS = ("ours", "timm", "wrapper", "stream")
RATIOS = (("ours", "timm"), ("ours", "wrapper"), ("stream", "ours"))
HEADER = (*CELL, *CONTENDERS, *(f"{one} / {other}" for one, other in RATIOS), "first call, ours and timm")


def positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="published architectures")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="memory is the peak of training steps")
    add("--batch_sizes", nargs="+", type=positive_int, default=[1, 8], help="images per step of a model")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of weights and images")
    add("--modes", nargs="+", choices=MODES, default=MODES[:2], help="reduce-overhead compiles with CUDA graphs")
    add("--attn_implementation", nargs="+", default=["sdpa"], help="one or more, of our model")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the models run")
    add("--seconds", type=float, default=15.0, help="seconds per measurement, of at least three rounds")
    add("--quick", action="store_true", help=f"a few minutes, with other defaults: {QUICK}")
    add("--output", type=Path, default=Path("outputs/benchmark"), help="folder of benchmark.md and benchmark.json")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def plan(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The cells to measure."""
    preprocessed = set()
    for variant, task in itertools.product(args.variants, args.tasks):
        choices = (args.batch_sizes, args.dtypes, args.modes, args.attn_implementation)
        if task in ("loading", "startup"):
            choices = ([1], ["float32"], ["eager"], [None])
        elif task == "pipeline":
            choices = (args.batch_sizes, args.dtypes, ["eager"], args.attn_implementation)
        elif task == "classifying":
            choices = ([PREPROCESSED_IMAGES], args.dtypes, CLASSIFYING_MODES, args.attn_implementation)
        elif task in PREPROCESSING_MODES:
            choices = ([PREPROCESSED_IMAGES], ["float32"], PREPROCESSING_MODES[task], [None])
            image_size = VARIANTS[variant]["preprocessing"]["input"]
            if (task, image_size) in preprocessed:  # It does not depend on anything else of a variant
                continue
            preprocessed.add((task, image_size))
        for choice in itertools.product(*choices):
            yield dict(zip(CELL, (variant, task, *choice), strict=True))


def format_value(values: list[float] | None, task: str) -> str:
    if not values:
        return ""
    value = statistics.median(values)
    return f"{value / 1e6:,.0f} MB" if task == "memory" else f"{value * 1e3:,.1f} ms"


def format_ratio(ours: list[float] | None, theirs: list[float] | None) -> str:
    """One value divided by another of the same round: the median and, of several rounds, the quartiles."""
    if not ours or not theirs:
        return ""
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def format_row(record: dict[str, Any]) -> list[str]:
    row = [str(record[name] or "") for name in CELL]
    if "error" in record:
        return [*row, f"failed: {record['error']}".replace("|", "/"), *[""] * (len(HEADER) - len(row) - 1)]
    values = record["values"]
    row += [format_value(values.get(name), record["task"]) for name in CONTENDERS]
    row += [format_ratio(values.get(one), values.get(other)) for one, other in RATIOS]
    first_calls = record.get("first_calls") or {}
    return [*row, ", ".join(f"{first_calls[name]:.1f} s" for name in ("ours", "timm") if name in first_calls)]


def format_report(results: dict[str, Any]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *map(format_row, results["cells"])]
    parts = (
        "# Benchmark",
        f"`{results['command']}`",
        ", ".join(f"{name} {value}" for name, value in results["machine"].items()),
        "Values are medians. Ratios are medians and quartiles over the rounds: below 1 ours takes less.",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
    )
    return "\n\n".join(parts) + "\n"


def write_results(results: dict[str, Any], output: Path) -> None:
    texts = {"benchmark.json": json.dumps(results, indent=1), "benchmark.md": format_report(results)}
    for name, text in texts.items():
        incomplete = output / f"{name}.incomplete"
        incomplete.write_text(text, encoding="utf-8")
        incomplete.replace(output / name)  # Whenever the run is ended, one version of the file is whole


def run_cells(args: argparse.Namespace) -> int:
    import torch

    sys.path.append(str(EXAMPLES))  # images are read as by the commands
    from measuring import Cell, describe_machine, measure

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: PyTorch finds no GPU, use --device cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    results: dict[str, Any] = {"command": command, "machine": describe_machine(args.device), "cells": []}
    cells = list(plan(args))
    for number, cell in enumerate(cells, start=1):
        options = {**cell, "variant": VARIANTS[cell["variant"]], "device": args.device}
        try:
            record = measure(Cell(**options), args.seconds)
        # Out of memory, or other logits than timm's: the remaining cells can still be measured
        except Exception as error:
            record = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        results["cells"].append({**cell, **record})
        write_results(results, args.output)
        print(f"[{number}/{len(cells)}]", *format_row(results["cells"][-1]), file=sys.stderr, flush=True)
    print(format_report(results), end="")
    return int(any("error" in record for record in results["cells"]))


def main() -> int:
    args = parse_arguments()
    try:
        return run_cells(args)
    except KeyboardInterrupt:
        print(f"interrupted: the cells measured so far are in {args.output}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
