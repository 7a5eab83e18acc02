"""The contenders of the benchmark, the work that they do, and how it is checked and measured."""

import argparse
import copy
import functools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import timm
import torch
import transformers
from accelerate import Accelerator
from common.data_sources import ImageSource
from common.images import find_images
from common.inference import best_labels, predict
from common.labelled_images import LabelledImages
from common.streams import StreamLoader, StreamTrainer
from common.workflow import transformed
from safetensors.torch import save_file
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms import Compose
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor, pipeline
from transformers.utils.logging import disable_progress_bar

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor, CrossViTImageProcessorPil
from crossvit.timm_checkpoints import ARCHITECTURES
from crossvit.training.augmentation import (
    AugmentationArguments,
    Collator,
    EvaluationTransform,
    TrainingTransform,
    timm_policy,
)


Step = Callable[[], Any]
CONTENDERS = ("ours", "timm", "wrapper")
COMPILE_MODES = {"compiled": "default", "reduce-overhead": "reduce-overhead"}
IMAGE_PROCESSORS: dict[str, Any] = {"torchvision": CrossViTImageProcessor, "pil": CrossViTImageProcessorPil}
EXAMPLES = Path(__file__).parents[2] / "examples"
PAPER_RECIPE = EXAMPLES / "paper_recipe.json"
PIPELINE_IMAGES = 16
READ_IMAGES, CLASSIFIED_IMAGES, CLASSES, SHARDS = 256, 1000, 8, 4
MIN_ROUNDS = 3
MIN_TURN_SECONDS = 0.05  # Shorter steps are repeated
# Of the difference from timm, relative to timm's largest value. On a CPU logits differed by up to 9.3e-7 in float32
# (a GPU computes convolutions in TF32, with 10 bits) and 1.7e-2 in bfloat16, pixel values by up to 1.4e-2.
LOGITS_TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
PIXEL_TOLERANCE = 2e-2
# Means and standard deviations of 40 randomly augmented batches differed by up to 0.04, with the recipe by up to 0.22
AUGMENTED_TOLERANCE = 0.3

disable_progress_bar()


@dataclass(frozen=True)
class Cell:
    """What all contenders do, interleaved."""

    variant: dict[str, Any]  # An entry of variants.json
    task: str
    batch_size: int
    dtype: str
    mode: str  # Of the models, or the backend of our image processor
    attn_implementation: str | None  # Of our model
    device: str

    @property
    def timm_name(self) -> str:
        return self.variant["timm_id"].removeprefix("timm/")


def describe_machine(device: str) -> dict[str, Any]:
    cpu = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        cpu = next(iter(re.findall(r"model name\s*: (.*)", cpuinfo.read_text())), cpu)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "CPU": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "Transformers": transformers.__version__,
        "timm": timm.__version__,
    }


def make_inputs(cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random images and labels for all."""
    generator, size = torch.Generator().manual_seed(0), cell.variant["preprocessing"]["input"]
    images = torch.randn(cell.batch_size, 3, size, size, generator=generator)
    labels = torch.randint(1000, (cell.batch_size,), generator=generator)
    return images.to(cell.device, getattr(torch, cell.dtype)), labels.to(cell.device)


def build_model(name: str, cell: Cell) -> Any:
    """A contender's model in evaluation mode, on the CPU in float32, with the same random weights for all."""
    torch.manual_seed(0)
    timm_model = timm.create_model(cell.timm_name).eval()
    with torch.no_grad():
        for parameter in timm_model.parameters():
            # A fresh model would mask swapped norms, which are all one, and biases, which are all zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    options: dict[str, Any] = {"num_labels": 1000}
    if name == "timm":
        return timm_model
    if name == "wrapper":
        wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=cell.timm_name, **options))
        wrapper.timm_model = timm_model
        return wrapper.eval()
    return CrossViTForImageClassification.from_pretrained(
        None,
        config=CrossViTConfig(**ARCHITECTURES[cell.variant["architecture"]], **options),
        state_dict=timm_model.state_dict(),
        attn_implementation=cell.attn_implementation,
    )


def get_logits(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def make_model_step(name: str, cell: Cell) -> Step:
    """A forward pass, or a training step with AdamW. It returns the logits."""
    images, labels = make_inputs(cell)
    model = build_model(name, cell).to(cell.device, getattr(torch, cell.dtype))
    if cell.mode == "checkpointing" and name == "ours":  # timm's CrossViT has no gradient checkpointing
        model.gradient_checkpointing_enable()
    is_compiled = cell.mode in COMPILE_MODES
    forward = torch.compile(model, dynamic=False, mode=COMPILE_MODES[cell.mode]) if is_compiled else model

    @torch.inference_mode()
    def infer() -> torch.Tensor:
        return get_logits(forward(images))

    def train() -> torch.Tensor:
        logits = get_logits(forward(images))
        cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits.detach()

    if cell.task == "inference":
        return infer
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)  # Small, so that the weights stay finite
    return train


def make_preprocessing_steps(cell: Cell) -> dict[str, Step]:
    """Pixel values of images of 500x375 pixels."""
    thumbnails = np.random.default_rng(0).integers(256, size=(cell.batch_size, 12, 16, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(thumbnail).resize((500, 375)) for thumbnail in thumbnails]
    edge, crop = (cell.variant["preprocessing"][name] for name in ("resize_shortest_edge", "center_crop"))
    processor = IMAGE_PROCESSORS[cell.mode](size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})
    pretrained_cfg = timm.get_pretrained_cfg(cell.timm_name).to_dict()
    transform = create_transform(**resolve_data_config(pretrained_cfg=pretrained_cfg))
    return {
        "ours": lambda: processor(images, return_tensors="pt")["pixel_values"],
        "timm": lambda: torch.stack([transform(image) for image in images]),
    }


@functools.cache
def write_photos(images: int) -> tempfile.TemporaryDirectory:
    """JPEG files of 500x400 pixels, with smooth colors and noise like a photo's, in a folder per class."""
    folder = tempfile.TemporaryDirectory()
    generator = np.random.default_rng(0)
    for number in range(images):
        thumbnail = generator.integers(256, size=(5, 6, 3), dtype=np.uint8)
        pixels = np.asarray(PIL.Image.fromarray(thumbnail).resize((500, 400)))
        noise = 8 * generator.standard_normal(pixels.shape, np.float32)
        pixels = (pixels + noise).clip(0, 255).astype(np.uint8)
        path = Path(folder.name, str(number % CLASSES), f"{number:03}.jpg")
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).save(path, quality=90)
    return folder


def make_reading_steps(cell: Cell) -> dict[str, Step]:
    """Pixel values of a batch of random images from JPEG files, augmented unless for evaluation."""
    folder = Path(write_photos(READ_IMAGES).name)
    mode, _, worker = cell.mode.partition(", ")
    edge, crop = (cell.variant["preprocessing"][name] for name in ("resize_shortest_edge", "center_crop"))
    processor = CrossViTImageProcessor(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})
    if mode == "evaluation":
        ours: Any = EvaluationTransform(processor)
        pretrained_cfg = timm.get_pretrained_cfg(cell.timm_name).to_dict()
        theirs = create_transform(**resolve_data_config(pretrained_cfg=pretrained_cfg))
    else:
        recipe = json.loads(PAPER_RECIPE.read_text(encoding="utf-8")) if mode == "recipe" else {}
        names = {field.name for field in fields(AugmentationArguments)}
        args = AugmentationArguments(**{name: value for name, value in recipe.items() if name in names})
        ours = TrainingTransform(args, processor)
        primary, secondary, final = create_transform(
            crop,
            is_training=True,
            scale=(args.crop_scale[0], args.crop_scale[1]),
            hflip=args.horizontal_flip,
            color_jitter=args.color_jitter or None,
            auto_augment=args.auto_augment,
            interpolation="bicubic",
            re_prob=args.random_erasing,
            re_mode="pixel",
            separate=True,
        )
        if args.auto_augment:  # timm 1.0.31 gives Pillow 13 a value that it refuses
            secondary = timm_policy(args.auto_augment, (crop, crop), tuple(processor.image_mean))
        theirs = Compose([primary, secondary, final])

    paths = sorted(folder.glob("*/*.jpg"))
    rows = {"image": list(map(str, paths)), "labels": [int(path.parent.name) for path in paths]}
    split = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))

    def make_loader(dataset: Any, collate: Any = None) -> DataLoader:
        return DataLoader(
            dataset,
            cell.batch_size,
            # A pass is one batch, so that turns are short and a worker has nothing to do in those of others
            sampler=RandomSampler(dataset, replacement=True, num_samples=cell.batch_size),
            collate_fn=collate,
            num_workers=1 if worker else 0,
            persistent_workers=bool(worker),
        )

    our_loader = make_loader(transformed(split, ours), Collator(CLASSES))
    timm_loader = make_loader(ImageDataset(folder, transform=theirs))
    return {"ours": lambda: next(iter(our_loader))["pixel_values"], "timm": lambda: next(iter(timm_loader))[0]}


def make_streaming_steps(cell: Cell, folder: Path) -> dict[str, Step]:
    """A pass over all images, from disk and as a stream, augmented for fine-tuning: pixel values of the last batch."""
    files, _, worker = cell.mode.partition(", ")
    source = write_photos(READ_IMAGES).name
    edge, crop = (cell.variant["preprocessing"][name] for name in ("resize_shortest_edge", "center_crop"))
    processor = CrossViTImageProcessor(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})
    transform, collate = TrainingTransform(AugmentationArguments(), processor), Collator(CLASSES)
    options: dict[str, Any] = {"num_workers": 1, "persistent_workers": True} if worker else {}

    images = LabelledImages.load(ImageSource(source)).splits["train"]
    if files == "parquet":
        # In any order, like those of a dataset that is published
        shuffled, source = images.cast_column("image", datasets.Image()).shuffle(seed=0), str(folder)
        for index in range(SHARDS):
            shuffled.shard(SHARDS, index).to_parquet(folder / f"train-{index:05}-of-{SHARDS:05}.parquet")
    stream = LabelledImages.load(ImageSource(source, streaming=True)).splits["train"]
    # Each pass over Parquet files ends with a wait for threads, 5 s since datasets 5.2: little in an epoch of millions
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    loaders = {
        "ours": DataLoader(
            transformed(images, transform), cell.batch_size, shuffle=True, collate_fn=collate, **options
        ),
        "stream": StreamLoader(
            transformed(stream, transform, shuffle_buffer_size=READ_IMAGES),
            Accelerator(cpu=True),
            cell.batch_size,
            collate,
            **options,
        ),
    }

    def read(loader: Any) -> torch.Tensor:
        *_, batch = loader
        return batch["pixel_values"]

    return {name: functools.partial(read, loader) for name, loader in loaders.items()}


def make_classifying_steps(cell: Cell) -> dict[str, Step]:
    """The scores of the top five classes of JPEG files, as `classify.py` or `evaluate_checkpoint.py` finds them."""
    folder = Path(write_photos(CLASSIFIED_IMAGES).name)
    command, _, workers = cell.mode.partition(", ")
    num_workers = int(workers.partition(" ")[0] or 0)
    edge, crop = (cell.variant["preprocessing"][name] for name in ("resize_shortest_edge", "center_crop"))
    processor = CrossViTImageProcessor(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})
    models = {name: build_model(name, cell).to(cell.device, getattr(torch, cell.dtype)) for name in ("ours", "timm")}

    def classify() -> torch.Tensor:
        options = argparse.Namespace(batch_size=cell.batch_size, num_workers=num_workers, compile=False)
        results = predict(best_scores, models["ours"], processor, find_images(folder), options)
        return torch.tensor([scores for _, scores in results])

    def best_scores(model: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        return best_labels(model(pixel_values).logits, model.config)[1:]

    trainer = StreamTrainer(
        models["ours"],
        transformers.TrainingArguments(
            tempfile.gettempdir(),
            per_device_eval_batch_size=cell.batch_size,
            dataloader_num_workers=num_workers,
            accelerator_config={"non_blocking": cell.device == "cuda"},
            use_cpu=cell.device == "cpu",
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=Collator(CLASSES),
        preprocess_logits_for_metrics=lambda logits, labels: logits.float().softmax(dim=-1).topk(5).values,
    )
    images = LabelledImages.load(ImageSource(str(folder))).splits["train"]

    def evaluate() -> torch.Tensor:
        return torch.from_numpy(trainer.predict(transformed(images, EvaluationTransform(processor))).predictions)

    pretrained_cfg = timm.get_pretrained_cfg(cell.timm_name).to_dict()
    transform = create_transform(**resolve_data_config(pretrained_cfg=pretrained_cfg))

    @torch.inference_mode()
    def loop() -> torch.Tensor:
        """What a user of timm writes."""
        loader = DataLoader(
            ImageDataset(folder, transform=transform),
            cell.batch_size,
            num_workers=num_workers,
            pin_memory=cell.device == "cuda",
        )
        scores = []
        for batch, _ in loader:
            logits = models["timm"](batch.to(cell.device, non_blocking=True).to(getattr(torch, cell.dtype)))
            scores.append(logits.float().softmax(dim=-1).topk(5).values.cpu())
        return torch.cat(scores)

    return {"ours": {"classify": classify, "evaluate": evaluate}[command], "timm": loop}


PIPELINE_SCRIPT = """
import sys
from transformers import pipeline
classifier = pipeline("image-classification", sys.argv[1])
for file in sys.argv[2:]:
    print(file, *(f"{entry['label']} {entry['score']:.1%}" for entry in classifier(file)), sep="  ", flush=True)
"""


def make_startup_steps(cell: Cell, folder: Path) -> dict[str, Step]:
    """From the command to the label of a photo, with a checkpoint of timm in `folder`: the index of the label."""
    pretrained_cfg = timm.get_pretrained_cfg(cell.timm_name).to_dict()
    config = {"architecture": cell.variant["architecture"], "num_classes": 1000, "pretrained_cfg": pretrained_cfg}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(build_model("timm", cell).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "script.py").write_text(PIPELINE_SCRIPT, encoding="utf-8")
    photo = str(next(Path(write_photos(READ_IMAGES).name).glob("*/*.jpg")))
    labels = list(CrossViTConfig.from_pretrained(folder).id2label.values())

    def run(*command: object) -> torch.Tensor:
        with subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            line = process.stdout.readline()
            process.kill()  # What follows the label does not count
        return torch.tensor([labels.index(line.split("  ")[1].rpartition(" ")[0])])

    return {
        "ours": functools.partial(run, EXAMPLES / "classify.py", photo, "--model", folder),
        "wrapper": functools.partial(run, folder / "script.py", folder, photo),
    }


def make_loading_steps(cell: Cell, folder: Path) -> dict[str, Step]:
    """A model from a safetensors file in `folder`, as each library loads its own."""
    build_model("ours", cell).save_pretrained(folder / "ours")
    build_model("wrapper", cell).save_pretrained(folder / "wrapper")
    save_file(build_model("timm", cell).state_dict(), folder / "timm.safetensors")
    return {
        "ours": lambda: CrossViTForImageClassification.from_pretrained(folder / "ours"),
        "timm": lambda: timm.create_model(cell.timm_name, checkpoint_path=folder / "timm.safetensors").eval(),
        "wrapper": lambda: TimmWrapperForImageClassification.from_pretrained(folder / "wrapper"),
    }


def make_pipeline_steps(cell: Cell) -> dict[str, Step]:
    """The scores of the top five classes of images of several sizes, from PIL images, in batches."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(200, 800, (PIPELINE_IMAGES, 2)).tolist()
    thumbnails = generator.integers(256, size=(PIPELINE_IMAGES, 12, 16, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(thumbnail).resize(size) for thumbnail, size in zip(thumbnails, sizes)]

    edge, crop = (cell.variant["preprocessing"][name] for name in ("resize_shortest_edge", "center_crop"))
    pretrained_cfg = timm.get_pretrained_cfg(cell.timm_name).to_dict()
    processors: dict[str, Any] = {
        "ours": CrossViTImageProcessor(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop}),
        "wrapper": TimmWrapperImageProcessor(pretrained_cfg, architecture=cell.timm_name),
    }
    models = {name: build_model(name, cell).to(cell.device, getattr(torch, cell.dtype)) for name in CONTENDERS}
    transform = create_transform(**resolve_data_config(pretrained_cfg=pretrained_cfg))

    def run_pipeline(name: str) -> Step:
        classifier = pipeline(
            "image-classification", model=models[name], image_processor=processors[name], device=cell.device
        )
        return lambda: torch.tensor(
            [[entry["score"] for entry in scores] for scores in classifier(images, batch_size=cell.batch_size)]
        )

    @torch.inference_mode()
    def loop() -> torch.Tensor:
        """What a user of timm writes."""
        scores = []
        for start in range(0, len(images), cell.batch_size):
            batch = torch.stack([transform(image) for image in images[start : start + cell.batch_size]])
            logits = models["timm"](batch.to(cell.device, getattr(torch, cell.dtype)))
            scores.append(logits.float().softmax(dim=-1).topk(5).values.cpu())
        return torch.cat(scores)

    return {"ours": run_pipeline("ours"), "timm": loop, "wrapper": run_pipeline("wrapper")}


def check_agreement(outcomes: dict[str, torch.Tensor], tolerance: float) -> float:
    """
    The largest difference from timm's outcome, or from ours without timm's, relative to its largest value.

    Raises:
        `RuntimeError`: if it exceeds the tolerance.
    """
    reference = "timm" if "timm" in outcomes else "ours"
    expected = outcomes[reference].float()
    worst = 0.0
    for name, outcome in outcomes.items():
        difference = ((outcome.float() - expected).abs().max() / expected.abs().max()).item()
        if not difference <= tolerance:  # True for NaN too
            raise RuntimeError(
                f"{name} differs from {reference} by {difference:.1e}, more than {tolerance:.0e}: not timed"
            )
        worst = max(worst, difference)
    return worst


def time_once(step: Step) -> float:
    """The seconds of one call of a step that takes seconds and ends with results on the CPU."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def time_in_turns(steps: dict[str, Step], seconds: float, is_long: bool = False) -> dict[str, list[float]]:
    """
    The seconds of a step in each round. In a round all contenders take a turn, so that what slows the machine for a
    while slows all of them. `Timer` calls the step once unmeasured, waits for the GPU and stops the garbage collector;
    steps that take seconds are called only once.
    """
    threads = torch.get_num_threads()
    timers = {name: Timer("step()", globals={"step": step}, num_threads=threads) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.monotonic() + seconds
    while len(times["ours"]) < MIN_ROUNDS or time.monotonic() < end:
        for name, timer in timers.items():
            if is_long:
                times[name].append(time_once(steps[name]))
            else:
                times[name].append(timer.blocked_autorange(min_run_time=MIN_TURN_SECONDS).median)
    return times


def measure_first_call(name: str, cell: Cell) -> float:
    """The seconds of the first step, which compiles the model, in this process, which must be a fresh one."""
    torch._inductor.config.force_disable_caches = True  # contenders share kernels
    step = make_model_step(name, cell)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure_peak_memory(name: str, cell: Cell) -> tuple[int, np.ndarray]:
    """
    The bytes that a model and two training steps take at most in this process, which must be a fresh one, and the
    logits. On a CPU it is the growth of the resident memory, on a GPU what PyTorch allocates.
    """
    before = 0 if cell.device == "cuda" else peak_resident_bytes()
    step = make_model_step(name, cell)
    logits = step().float().cpu().numpy()
    step()  # In the first one the optimizer's state came after the backward pass
    peak = torch.cuda.max_memory_allocated() if cell.device == "cuda" else peak_resident_bytes()
    return peak - before, logits


def peak_resident_bytes() -> int:
    # Linux only. `resource.getrusage` would start from the memory of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def run_in_fresh_process(function: Callable, *arguments: Any) -> Any:
    # Ctrl-C reaches that process as well, and ends it without a traceback
    quietly: dict[str, Any] = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    with ProcessPoolExecutor(1, get_context("spawn"), **quietly) as executor:
        return executor.submit(function, *arguments).result()


def measure(cell: Cell, seconds: float) -> dict[str, Any]:
    """
    Measures a cell, once all contenders are found to compute the same.

    Returns:
        `dict[str, Any]`: "values", by contender: the seconds of a step in each round, or the bytes; "difference", of
        `check_agreement`; and "first_calls", by contender: the seconds of the first step of a compiled model.

    Raises:
        `RuntimeError`: if contenders do not compute the same.
    """
    torch.compiler.reset()  # PyTorch stops compiling after a number of models
    # The torchvision backend rounds differently
    in_pixels = cell.task in ("preprocessing", "reading", "streaming", "pipeline", "classifying")
    tolerance = PIXEL_TOLERANCE if in_pixels else LOGITS_TOLERANCES[cell.dtype]
    if cell.task == "memory":
        found = {name: run_in_fresh_process(measure_peak_memory, name, cell) for name in CONTENDERS}
        logits = {name: torch.from_numpy(values) for name, (_, values) in found.items()}
        peaks = {name: [peak] for name, (peak, _) in found.items()}
        return {"values": peaks, "difference": check_agreement(logits, tolerance)}
    first_calls: dict[str, float] = {}
    if cell.mode in COMPILE_MODES:
        # The first one twice, since it also reads the compiler from the disk
        order = (CONTENDERS[0], *CONTENDERS)
        first_calls = {name: run_in_fresh_process(measure_first_call, name, cell) for name in order}
    with tempfile.TemporaryDirectory() as folder:
        if cell.task == "preprocessing":
            steps = make_preprocessing_steps(cell)
        elif cell.task == "reading":
            steps = make_reading_steps(cell)
        elif cell.task == "streaming":
            steps = make_streaming_steps(cell, Path(folder))
        elif cell.task == "pipeline":
            steps = make_pipeline_steps(cell)
        elif cell.task == "classifying":
            steps = make_classifying_steps(cell)
        elif cell.task == "startup":
            steps = make_startup_steps(cell, Path(folder))
        elif cell.task == "loading":
            steps = make_loading_steps(cell, Path(folder))
        else:
            steps = {name: make_model_step(name, cell) for name in CONTENDERS}
        outcomes = {}
        for name, step in steps.items():
            transformers.set_seed(0)  # For the same images
            outcomes[name] = copy.deepcopy(step())  # A copy, since CUDA graphs write into the same memory again
        if cell.task == "streaming" or (cell.task == "reading" and "evaluation" not in cell.mode):
            tolerance = AUGMENTED_TOLERANCE
            outcomes = {name: torch.stack([batch.mean(), batch.std()]) for name, batch in outcomes.items()}
        if cell.task == "loading":
            with torch.no_grad():
                outcomes = {name: get_logits(model(make_inputs(cell)[0].cpu())) for name, model in outcomes.items()}
        difference = check_agreement(outcomes, tolerance)
        values = time_in_turns(steps, seconds, is_long=cell.task in ("classifying", "startup"))
        return {"values": values, "difference": difference, "first_calls": first_calls}
