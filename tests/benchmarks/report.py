"""The report of a benchmark, made of its JSON alone: tables, goals met or missed, and a picture."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


Record = dict[str, Any]  # a cell of the JSON
COLORS = {"float32": "#0072B2", "bfloat16": "#D55E00", "autocast": "#009E73"}  # different to color-blind eyes too
MARKERS = "osD^vP"
PEERS = {"timm": "timm", "timm_compiled": "timm compiled", "wrapper": "wrapper", "wrapper_compiled": "wrapper"}


def milliseconds(record: Record, name: str) -> float | None:
    times = record.get("rounds", {}).get(name)
    return 1000 * float(np.median(times)) if times else None


def ratio(record: Record, peer: str, name: str = "crossvit") -> tuple[float, float, float] | None:
    """Our time by that of a peer in the same round: the median and the quartiles of all rounds."""
    rounds = record.get("rounds", {})
    if name not in rounds or peer not in rounds:
        return None
    median, low, high = np.percentile(np.array(rounds[name]) / np.array(rounds[peer]), (50, 25, 75))
    return float(median), float(low), float(high)


def memory_ratio(record: Record) -> float | None:
    ours, timm = (record.get("memory", {}).get(name) for name in ("crossvit", "timm"))
    return ours / timm if ours and timm else None


def share_of_limit(record: Record, limits: dict[str, Any], name: str = "crossvit") -> float | None:
    """The rate of timm's operations, whatever the contender really computes, by that of a matrix product."""
    time, rate = milliseconds(record, name), limits["matrix"].get(record["dtype"])
    if time is None or rate is None or "flops" not in record:
        return None
    return record["flops"]["timm"] * record["batch_size"] / (time / 1000) / rate


def is_model_cell(record: Record) -> bool:
    return record["task"] in ("inference", "training")


def label(record: Record) -> str:
    largest = " (largest)" if record.get("largest") else ""
    return f"{record['variant']} {record['task']} {record['batch_size']}{largest} {record['dtype']} {record['mode']}"


def describe(record: Record) -> str:
    """A cell in a few words."""
    if "error" in record:
        return record["error"]
    words = [f"{milliseconds(record, 'crossvit'):.1f} ms"]
    for peer, peer_name in PEERS.items():
        if found := ratio(record, peer):
            words.append(f"{found[0]:.3f} of {peer_name}'s time")
    return ", ".join(words)


@dataclass
class Goal:
    text: str
    device: str
    applies: Callable[[Record], bool]
    value: Callable[[Record, dict[str, Any]], float | None]
    limit: float
    at_least: bool = False


def time_goal(text: str, device: str, limit: float, peer: str = "timm", **conditions: Any) -> Goal:
    return Goal(
        text,
        device,
        lambda record: all(record[name] == value for name, value in conditions.items()),
        lambda record, limits: found[0] if (found := ratio(record, peer)) else None,
        limit,
    )


def worst_ratio(record: Record, limits: dict[str, Any]) -> float | None:
    """Against all peers in the same mode; only beside compiled models, timm's eager one runs in another."""
    return max((found[0] for peer in PEERS if (found := ratio(record, peer))), default=None)


GPU_INFERENCE: Record = {"task": "inference", "dtype": "bfloat16", "batch_size": 256, "mode": "compiled"}
GPU_TRAINING: Record = {"task": "training", "batch_size": 256, "mode": "compiled"}
CPU_INFERENCE: Record = {"task": "inference", "mode": "eager"}
GOALS = [
    time_goal("inference, 8 images, float32: <= 0.95 of timm's time", "cpu", 0.95,
              **CPU_INFERENCE, batch_size=8, dtype="float32"),
    time_goal("inference, 8 images, bfloat16: <= 0.85 of timm's time", "cpu", 0.85,
              **CPU_INFERENCE, batch_size=8, dtype="bfloat16"),
    time_goal("inference, 1 image: <= timm's time", "cpu", 1.0, **CPU_INFERENCE, batch_size=1),
    time_goal("training: <= 0.95 of timm's time", "cpu", 0.95, task="training", mode="eager"),
    Goal("never slower than any peer", "cpu", is_model_cell, worst_ratio, 1.0),
    time_goal("inference, 256 images, bfloat16, compiled: 1.5 times timm's throughput", "cuda", 1 / 1.5,
              **GPU_INFERENCE),
    time_goal("the same: 1.1 times the throughput of timm's, compiled", "cuda", 1 / 1.1, "timm_compiled",
              **GPU_INFERENCE),
    Goal("the same, crossvit_base: >= 45 % of the rate of a matrix product", "cuda",
         lambda record: record["variant"] == "crossvit_base" and GPU_INFERENCE.items() <= record.items(),
         share_of_limit, 0.45, at_least=True),
    time_goal("inference, 1 image, CUDA graphs: <= 1/3 of timm's time", "cuda", 1 / 3,
              task="inference", batch_size=1, mode="cuda_graphs"),
    time_goal("training, 256 images, compiled: 1.3 times timm's throughput", "cuda", 1 / 1.3, **GPU_TRAINING),
    time_goal("the same: 1.1 times the throughput of timm's, compiled", "cuda", 1 / 1.1, "timm_compiled",
              **GPU_TRAINING),
    Goal("training: <= timm's memory", "cuda",
         lambda record: record["task"] == "training" and record["mode"] == "eager",
         lambda record, limits: memory_ratio(record), 1.0),
    Goal("training, 256 images, gradient checkpointing: < 1/2 of timm's memory", "cuda",
         lambda record: record["mode"] == "checkpointing" and record["batch_size"] == 256,
         lambda record, limits: memory_ratio(record), 0.5),
    Goal("never slower than any peer", "cuda",
         lambda record: is_model_cell(record) and record["mode"] != "checkpointing", worst_ratio, 1.0),
]  # fmt: skip


def goal_rows(results: dict[str, Any]) -> Iterator[list[str]]:
    for goal in GOALS:
        values = [
            (value, record)
            for record in results["cells"]
            if goal.device == results["device"]
            and goal.applies(record)
            and (value := goal.value(record, results["limits"])) is not None
        ]
        if not values:
            continue
        values.sort(key=lambda pair: pair[0], reverse=not goal.at_least)
        missed = [
            f"{label(record)} ({value:.3f})"
            for value, record in values
            if (value < goal.limit if goal.at_least else value > goal.limit)
        ]
        yield [
            goal.text,
            "missed" if missed else "met",
            f"{len(values) - len(missed)} of {len(values)}",
            f"{values[0][0]:.3f}",
            "; ".join(missed),
        ]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_spread(found: tuple[float, float, float] | None) -> str:
    return "{:.3f} ({:.3f}-{:.3f})".format(*found) if found else ""


def number(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def model_row(record: Record, limits: dict[str, Any]) -> list[str]:
    size = f"{record['batch_size']}{' (largest)' if record.get('largest') else ''}"
    row = [record["variant"], record["task"], size, record["dtype"], record["mode"]]
    if "error" in record:
        return [*row, f"failed: {record['error']}".replace("|", "/"), *[""] * 8]
    memory = record["memory"]
    megabytes = [number(memory[name] / 1e6, ",.0f") if memory.get(name) else "" for name in ("crossvit", "timm")]
    return [
        *row,
        number(milliseconds(record, "crossvit")),
        number(milliseconds(record, "timm")),
        with_spread(ratio(record, "timm")),
        with_spread(ratio(record, "timm_compiled")),
        with_spread(ratio(record, "wrapper") or ratio(record, "wrapper_compiled")),
        " / ".join(number(share_of_limit(record, limits, name), ".0%") for name in ("crossvit", "timm")),
        " / ".join(number(record["flops"][name] / 1e9, ".2f") for name in ("crossvit", "timm")),
        *megabytes,
    ]


def make_report(results: dict[str, Any]) -> str:
    machine, limits, cells = results["machine"], results["limits"], results["cells"]
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in sorted(limits["matrix"].items()))
    memory_kind = (
        "what PyTorch allocated on the GPU at most, without the images"
        if results["device"] == "cuda"
        else "by how much the resident memory of a fresh process grew in two steps at most, beyond weights and images"
    )
    parts = [
        "# Benchmark",
        f"`{results['command']}`",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads;"
        f" {machine['gpu'] or 'no GPU was at hand, what needs one is left out'}. PyTorch {machine['torch']},"
        f" timm {machine['timm']}, Transformers {machine['transformers']}, Python {machine['python']}."
        f" It took {results.get('seconds', 0) / 60:.1f} minutes.",
        f"Limits, measured in this run: large matrix products {rates}; a large copy {limits['copy'] / 1e9:,.1f} GB/s"
        " read and written.",
        "Times are medians of rounds in which all contenders took turns. Ratios are our time by the peer's in the same"
        " round, their median and quartiles: below 1 ours is faster. All contenders of a cell had the same weights"
        " and, before they were measured, gave the same logits.",
    ]
    if results["left_out"]:
        parts.append(f"For want of time {results['left_out']} cells were left out.")
    if rows := list(goal_rows(results)):
        parts += ["## Goals", table(["goal", "result", "cells that met it", "worst", "missed by"], rows)]
    if rows := [model_row(record, limits) for record in cells if is_model_cell(record)]:
        header = [
            "variant", "task", "images", "dtype", "mode", "ours, ms", "timm eager, ms", "ours / timm eager",
            "ours / timm in this mode", "ours / wrapper", "share of matrix rate, ours / timm",
            "GFLOP per image, ours / timm", "ours, MB", "timm, MB",
        ]  # fmt: skip
        parts += [
            "## Inference and training",
            "In the modes other than eager, timm's eager model stays the one of the first comparison. The share of the"
            " matrix rate counts timm's operations for all, so that a contender that gets along with fewer is not"
            f" punished. Memory is {memory_kind}.",
            table(header, rows),
        ]
    if rows := [
        [record["variant"], f"failed: {record['error']}", *[""] * 4]
        if "error" in record
        else [
            record["variant"],
            *(number(milliseconds(record, name)) for name in ("crossvit", "timm", "wrapper")),
            with_spread(ratio(record, "timm")),
            with_spread(ratio(record, "wrapper")),
        ]
        for record in cells
        if record["task"] == "loading"
    ]:
        header = ["variant", "ours, ms", "timm, ms", "wrapper, ms", "ours / timm", "ours / wrapper"]
        parts += ["## Loading a checkpoint", table(header, rows)]
    if rows := [
        [record["variant"], name, f"failed: {record['error']}", "", ""]
        if "error" in record
        else [
            record["variant"],
            name,
            *(f"{1000 * record['batch_size'] / milliseconds(record, peer):.0f}" for peer in (key, "timm")),
            with_spread(ratio(record, "timm", key)),
        ]
        for record in cells
        if record["task"] == "preprocessing"
        for key, name in (("crossvit", "CrossViTImageProcessor"), ("crossvit_pil", "CrossViTImageProcessorPil"))
    ]:
        header = ["as for", "image processor", "ours, images/s", "timm, images/s", "our time / timm's"]
        parts += ["## Preprocessing of images of 500x375 pixels", table(header, rows)]
    return "\n\n".join(parts) + "\n"


def draw(results: dict[str, Any]) -> Figure | None:
    """Our time by timm's in the same mode: a panel per task and mode, a row per variant, a point per cell."""
    records = [record for record in results["cells"] if is_model_cell(record) and "rounds" in record]
    if not records:
        return None
    variants = list(dict.fromkeys(record["variant"] for record in records))
    panels = list(dict.fromkeys((record["task"], record["mode"]) for record in records))
    panels.sort(key=lambda panel: panel[1] != "eager")
    # Batch sizes that were found to be the largest differ from cell to cell
    sizes = list(dict.fromkeys("largest" if r.get("largest") else str(r["batch_size"]) for r in records))
    dtypes = [dtype for dtype in COLORS if any(record["dtype"] == dtype for record in records)]
    kinds = [(size, dtype) for size in sizes for dtype in dtypes]
    width, height = 2.2 + 3.6 * len(panels), 2.2 + (0.2 + 0.12 * len(kinds)) * len(variants)
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]

    for (task, mode), axis in zip(panels, axes):
        for record in records:
            if (record["task"], record["mode"]) != (task, mode):
                continue
            found = ratio(record, "timm_compiled") or ratio(record, "timm")
            size = "largest" if record.get("largest") else str(record["batch_size"])
            # The cells of a variant one below the other
            place = variants.index(record["variant"]) + 0.75 * (
                (kinds.index((size, record["dtype"])) + 0.5) / len(kinds) - 0.5
            )
            axis.errorbar(
                found[0], place, xerr=[[found[0] - found[1]], [found[2] - found[0]]], color=COLORS[record["dtype"]],
                marker=MARKERS[sizes.index(size) % len(MARKERS)], markersize=5, linewidth=1.2,
            )  # fmt: skip
        axis.axvline(1.0, color="black", linewidth=1)
        for border in range(1, len(variants)):
            axis.axhline(border - 0.5, color="#DDDDDD", linewidth=0.8)
        axis.set_title(f"{task}, {mode.replace('_', ' ')}", fontsize=11)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.grid(axis="x", color="#EEEEEE")
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(variants)), variants)
    axes[0].set_ylim(len(variants) - 0.5, -0.5)
    figure.supxlabel("our time / timm's time in the same mode (left of 1: ours is faster)", fontsize=11)
    handles = [Line2D([], [], color=COLORS[dtype], linewidth=3, label=dtype) for dtype in dtypes] + [
        Line2D(
            [],
            [],
            color="#555555",
            linestyle="",
            marker=MARKERS[place % len(MARKERS)],
            label="1 image" if size == "1" else f"{size} images",
        )
        for place, size in enumerate(sizes)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=10)
    return figure


def write_report(results: dict[str, Any], output: Path) -> str:
    """Writes benchmark.md and benchmark.png; returns the former."""
    report = make_report(results)
    (output / "benchmark.md").write_text(report, encoding="utf-8")
    if figure := draw(results):
        figure.savefig(output / "benchmark.png")
    return report
