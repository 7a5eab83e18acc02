"""How time, memory and operations are measured."""

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from reference import VARIANTS
from timm_reference import timm_variant
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .contenders import (
    COMPILE_OPTIONS,
    CONTENDERS,
    WEIGHTS_DTYPE,
    Cell,
    Step,
    make_inputs,
    make_loading_steps,
    make_preprocessing_steps,
    make_step,
)


MIN_SECONDS = 0.05  # of a contender in a round, against the coarseness of clocks and short disturbances
MIN_ROUNDS = 3
MAX_BATCH_SIZE = 1 << 16
# By how much logits may differ, of the largest: 2e-6 and 2e-2 were seen. Convolutions on a GPU are in TF32 by default.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "autocast": 5e-2}
PIXEL_TOLERANCE = 2e-2  # Resizing by torchvision and by PIL rounds differently


class DisagreementError(RuntimeError):
    """Contenders that do not compute the same, so that their times mean nothing."""


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    if (path := Path("/proc/cpuinfo")).is_file():
        cpu = next(iter(re.findall(r"model name\s*: (.*)", path.read_text())), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "transformers": transformers.__version__,
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_calls(step: Step, calls: int, device: str, latency: bool = False) -> float:
    """The seconds of a call; for the latency each call waits until the device has done the work."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
        if latency:
            synchronize(device)
    synchronize(device)
    return (time.perf_counter() - start) / calls


def time_rounds(
    steps: dict[str, Step], rounds: int, seconds: float, device: str, latency: bool = False
) -> dict[str, list[float]]:
    """
    The seconds of a call, by contender and round. In each round all contenders take their turn, in another order than
    in the last one: what slows the machine for a while meets all of them.

    Args:
        steps (`dict[str, Step]`): warmed up.
        rounds (`int`): how many.
        seconds (`float`): after which no round begins, but for the first `MIN_ROUNDS`.
    """
    calls = {
        name: math.ceil(MIN_SECONDS / max(time_calls(step, 1, device, latency), 1e-6)) for name, step in steps.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            if number >= MIN_ROUNDS and time.perf_counter() > end:
                break
            for name in order:
                if device == "cuda":
                    steps[name]()  # The allocator takes back first what the last contender left to it
                times[name].append(time_calls(steps[name], calls[name], device, latency))
            order.append(order.pop(0))
    finally:
        gc.enable()
    return times


def start_cublas() -> None:
    """Lets cuBLAS take its workspaces, for forward and backward passes, lest they count as the first contender's."""
    matrix = torch.ones(1, 1, device="cuda", requires_grad=True)
    (matrix @ matrix).backward()


def outcome(result: Any, cell: Cell) -> torch.Tensor:
    """What contenders must agree on: the logits, or the pixel values."""
    if isinstance(result, nn.Module):
        with torch.no_grad():
            outputs = result(make_inputs(cell)[0])
        result = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    return result.float().cpu()


def largest_difference(outcomes: dict[str, torch.Tensor], cell: Cell) -> float:
    """
    How far contenders are from timm's outcome, as a share of its largest number.

    Raises:
        `DisagreementError`: if that is more than rounding.
    """
    expected = outcomes["timm"]
    scale = expected.abs().max().item()
    tolerance = PIXEL_TOLERANCE if cell.task == "preprocessing" else TOLERANCE[cell.dtype]
    differences = {name: (found - expected).abs().max().item() / scale for name, found in outcomes.items()}
    for name, difference in differences.items():
        if not difference <= tolerance:
            raise DisagreementError(f"{name} does not compute what timm does: off by {difference:.1e} of the largest")
    return max(differences.values())


def measure(cell: Cell, reference: nn.Module, rounds: int, seconds: float, with_memory: bool) -> dict[str, Any]:
    """
    Measures a cell.

    Returns:
        `dict[str, Any]`: "rounds", of `time_rounds`; "difference", of `largest_difference`; and "memory", the peak
        of each contender in bytes, where it was measured.
    """
    torch.compiler.reset()  # or PyTorch would silently stop to compile after some models
    memory: dict[str, int | None] = {}
    steps: dict[str, Step] = {}
    outcomes: dict[str, torch.Tensor] = {}
    compiled = cell.mode in COMPILE_OPTIONS

    def warm_up(name: str) -> None:
        outcomes[name] = outcome(steps[name](), cell)
        # After the first call, which compiles, those that record a CUDA graph and replay it. The second step of a
        # training needs the most memory. A slow processor has enough of one call and the one that counts the calls.
        for _ in range(2 if compiled or cell.device == "cuda" else 0):
            steps[name]()

    with tempfile.TemporaryDirectory() as folder:
        if cell.task in ("inference", "training"):
            inputs = make_inputs(cell)
            if cell.device == "cuda":
                start_cublas()
            for name in CONTENDERS[cell.mode]:
                if cell.device == "cuda":
                    gc.collect()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                steps[name] = make_step(name, cell, reference, inputs)
                warm_up(name)
                if cell.device == "cuda":
                    synchronize(cell.device)
                    memory[name] = torch.cuda.max_memory_allocated() - before
        else:
            loading = cell.task == "loading"
            steps = make_loading_steps(cell, reference, Path(folder)) if loading else make_preprocessing_steps(cell)
            for name in steps:
                warm_up(name)
        difference = largest_difference(outcomes, cell)
        times = time_rounds(steps, rounds, seconds, cell.device, latency=cell.batch_size == 1)
    if with_memory and cell.device == "cpu" and not compiled and cell.task in ("inference", "training"):
        memory = {name: memory_in_child(name, cell) for name in steps}
    return {"rounds": times, "difference": difference, "memory": memory}


def memory_in_child(name: str, cell: Cell) -> int | None:
    """`peak_memory` in a fresh process. It is `None` if the system ends that process for want of memory."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(
            ["timm", "command_line", "transformers.models.timm_wrapper.modeling_timm_wrapper"]
        )
    try:
        with ProcessPoolExecutor(1, context, end_quietly_on_interrupt) as executor:
            return executor.submit(peak_memory, name, cell, torch.get_num_threads()).result()
    except BrokenProcessPool:
        return None


def end_quietly_on_interrupt() -> None:
    """Ctrl-C reaches the child too, which ends without a trace."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def peak_memory(name: str, cell: Cell, threads: int) -> int | None:
    """
    The bytes of memory that two steps of a contender take at most, beyond its weights and images: the growth of the
    resident set of this process. `None` where the system does not tell, as only Linux does.
    """
    torch.set_num_threads(threads)
    step = make_step(name, cell, timm_variant(VARIANTS[cell.variant]), make_inputs(cell))
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what building the model has left
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident_bytes("VmRSS")
        step()
        step()
        return resident_bytes("VmHWM") - before
    except (AttributeError, OSError):
        return None


def resident_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def find_largest_batch(cell: Cell, reference: nn.Module) -> int:
    """
    The largest batch size with which all contenders run, to an eighth.

    Raises:
        `torch.OutOfMemoryError`: if not even one image fits.
    """
    fitting, too_large = 0, None
    size = 256
    while 1 <= size <= MAX_BATCH_SIZE:
        if fits(replace(cell, batch_size=size, mode="eager"), reference):
            fitting = size
        else:
            too_large = size
        if too_large is None:
            size = 2 * fitting
        elif fitting == 0:
            size = too_large // 2
        elif too_large - fitting <= max(1, fitting // 8):
            break
        else:
            size = (fitting + too_large) // 2
    if fitting == 0:
        raise torch.OutOfMemoryError("the GPU has no memory for one image")
    return fitting


def fits(cell: Cell, reference: nn.Module) -> bool:
    steps: list[Step] = []
    try:
        inputs = make_inputs(cell)
        # The others' weights stay beside those of the one that runs, as when they are measured
        for name in CONTENDERS[cell.mode]:
            steps.append(make_step(name, cell, reference, inputs))
            for _ in range(2):  # the first step of a training makes the state of the optimizer
                steps[-1]()
            synchronize(cell.device)
            torch.cuda.empty_cache()
        return True
    except RuntimeError:  # out of memory, or more numbers than a kernel can index
        return False
    finally:
        steps.clear()
        gc.collect()
        torch.cuda.empty_cache()


def count_flops(name: str, cell: Cell, reference: nn.Module) -> int:
    """The floating point operations per image of a contender's matrix products and convolutions, attention's too."""
    single = Cell(cell.variant, cell.task, batch_size=1)
    step = make_step(name, single, reference, make_inputs(single))
    # The counter does not know the fused attention of the CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def measure_limits(dtypes: list[str], device: str) -> dict[str, Any]:
    """What the machine can do: operations per second of a large matrix product, bytes per second of a large copy."""
    side = 8192 if device == "cuda" else 2048
    matrix = {}
    for dtype in {"bfloat16" if dtype == "autocast" else dtype for dtype in dtypes}:
        left, right = torch.randn(2, side, side, device=device, dtype=WEIGHTS_DTYPE[dtype])
        matrix[dtype] = 2 * side**3 / best_seconds(partial(torch.matmul, left, right), device)
    if "autocast" in dtypes:
        matrix["autocast"] = matrix["bfloat16"]
    source = torch.ones(1 << 28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device)
    return {"matrix": matrix, "copy": 2 * source.nbytes / seconds}  # it reads and it writes


def best_seconds(step: Step, device: str) -> float:
    step()
    return min(time_rounds({"limit": step}, 5, 5.0, device)["limit"])
