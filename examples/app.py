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
"""A page to try a CrossViT on: drop an image, see its best labels and where both branches look.

    pip install gradio
    python examples/app.py                                        # the quickstart's model, which is trained if need be
    python examples/app.py --model my-crossvit                    # a folder or a model of the Hub
    python examples/app.py --model my-crossvit --space my-space   # writes a folder that is a Space of the Hub

Images are decoded in memory; the files that were uploaded are deleted within two minutes.
"""

import signal


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a trace

import argparse
import base64
import html
import importlib.metadata
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
from command_line import load_checkpoint, quickstart_model, run
from transformers import ImageClassificationPipeline
from transformers.utils import logging

import crossvit
from crossvit.interpretability.attention_maps import AttentionMap, AttentionMaps
from crossvit.interpretability.plotting import display_size, overlay
from crossvit.training.errors import CommandError
from crossvit.training.image_files import read_image


SCRIPT = Path(__file__)
MODEL_OF_SPACE = SCRIPT.with_name("model")
MAX_PIXELS = 50_000_000  # of an upload; a small file can hold many
VISITORS = 4  # whose images are classified at the same time
TITLE = "Where CrossViT looks"
INTRODUCTION = """\
# Where CrossViT looks

CrossViT sees an image at two scales, with small patches (branch 0) and with large ones (branch 1). In each stage the
class token of a branch attends to the patches of its branch, and then visits those of the other. Drop an image to see
what it is taken for, and what the class tokens attend to: bright is most. Uploads are not kept.
"""
CARD = """\
---
title: {title}
emoji: 🔎
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: apache-2.0
---

{introduction}
The folder `crossvit` is CrossViT for Transformers, `model` a model of it. The paper:
[arXiv:2103.14899](https://arxiv.org/abs/2103.14899).
"""


def refuse(message: str) -> tuple[None, None]:
    """Says why, and clears what is shown: an error would leave the maps of the image before."""
    gr.Warning(message, title="Refused")
    return None, None


@dataclass
class Explanation:
    """
    What is kept of an image while its visitor is there: a small copy, and the maps of its class tokens.

    Args:
        image (`PIL.Image.Image`): as large as it is shown.
        maps (`list[list[list[tuple[str, AttentionMap]]]]`): by stage, and by head, of which the first are the mean of
            all: what they show, and the maps.
        rollout (`AttentionMap`): over all stages.
    """

    image: PIL.Image.Image
    maps: list[list[list[tuple[str, AttentionMap]]]]
    rollout: AttentionMap


class Explainer:
    """Classifies images and draws their maps, for several threads at once."""

    def __init__(self, model: Any, processor: Any, max_megabytes: float):
        model.set_attn_implementation("eager")  # for good, as it is read by all threads
        self.model, self.processor, self.max_megabytes = model.eval(), processor, max_megabytes
        self.pipeline = ImageClassificationPipeline(model=model, image_processor=processor)

    def explain(self, path: str | None) -> tuple[dict[str, float] | None, Explanation | None]:
        """The scores of the best labels, and the maps, of an uploaded file."""
        if path is None:  # It was taken away
            return None, None
        if Path(path).stat().st_size > self.max_megabytes * 1e6:
            return refuse(f"The file is larger than {self.max_megabytes:g} MB.")
        try:
            image = read_image({"bytes": Path(path).read_bytes(), "path": Path(path).name})
        except CommandError as error:
            return refuse(f"This file cannot be read as an image: {error}")
        maps = AttentionMaps(self.model, self.processor, image)
        scores = {entry["label"]: entry["score"] for entry in self.pipeline.postprocess(maps.outputs, top_k=5)}
        height, width = display_size(image)
        stages = [
            [self.class_token_maps(maps, stage, head) for head in (None, *range(min(maps.config.num_heads)))]
            for stage in range(len(maps.config.depth))
        ]
        return scores, Explanation(image.resize((width, height)), stages, maps.rollout())

    def class_token_maps(self, maps: AttentionMaps, stage: int, head: int | None) -> list[tuple[str, AttentionMap]]:
        """The maps of the last layers of a stage, and of its fusions."""
        named = []
        for branch, depth in enumerate(maps.config.depth[stage][:-1]):
            if depth:
                grid = "{}x{} patches".format(*maps.grid_sizes[branch])
                named.append((f"Branch {branch} at its {grid}", maps.self_attention(branch, stage, head=head)))
        for branch in range(maps.config.num_branches):
            visited = (branch + 1) % maps.config.num_branches
            named.append(
                (f"Branch {branch} on its visit to branch {visited}", maps.cross_attention(branch, stage, head))
            )
        return named

    def draw(self, explanation: Explanation | None, stage: int, head: int) -> str:
        """The maps of a stage, from 1, and of a head, from 1, or 0 for the mean of them, as HTML."""
        if explanation is None:
            return ""
        named = [("Rollout over all stages", explanation.rollout), *explanation.maps[stage - 1][head]]
        size = explanation.image.size[::-1]
        figures = []
        for name, attention in [("The image", None), *named]:
            picture = explanation.image
            if attention is not None:
                picture = overlay(picture, attention.on_image(smooth=True, image_size=size))
            # In the page itself: a file would have to be kept
            picture.save(content := io.BytesIO(), format="PNG")
            source = base64.b64encode(content.getvalue()).decode()
            figures.append(
                f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{source}">'
                f"<figcaption>{html.escape(name)}</figcaption></figure>"
            )
        return f'<div class="maps">{"".join(figures)}</div>'


STYLE = """
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.maps figure { margin: 0; }
.maps img { width: 100%; }
.maps figcaption { text-align: center; }
"""


def make_page(explainer: Explainer, keep_seconds: int) -> gr.Blocks:
    config = explainer.model.config
    # How often to look for uploads to delete, and how old they are then
    page = gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(keep_seconds, keep_seconds))
    with page:
        gr.Markdown(INTRODUCTION)
        explanation = gr.State(time_to_live=3600)
        with gr.Row():
            with gr.Column():
                upload = gr.File(
                    label=f"Image, at most {explainer.max_megabytes:g} MB", file_types=["image"], elem_id="upload"
                )
                stages = len(config.depth)
                stage = gr.Slider(
                    1, max(2, stages), value=stages, step=1, label="Stage", elem_id="stage", visible=stages > 1
                )
                head = gr.Slider(
                    0, min(config.num_heads), value=0, step=1, label="Head (0: the mean of all)", elem_id="head"
                )
            labels = gr.Label(num_top_classes=5, label="Top 5", elem_id="labels")
        maps = gr.HTML(elem_id="maps")

        drawing: dict[str, Any] = {
            "fn": explainer.draw,
            "inputs": [explanation, stage, head],
            "outputs": maps,
            "show_progress": "hidden",
            "concurrency_limit": VISITORS,
        }
        upload.change(
            explainer.explain, upload, [labels, explanation], api_name="explain", concurrency_limit=VISITORS
        ).then(**drawing, api_name="draw")
        # Only the last place of a slider that is moved on while its maps are drawn
        gr.on([stage.change, head.change], **drawing, trigger_mode="always_last", api_name=False)
    return page


def write_space(model: Any, processor: Any, folder: Path) -> None:
    """A folder with all that a Space needs: this page, the package, the model, the requirements and the card."""
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(f"--space {folder}: is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SCRIPT, folder / "app.py")
    shutil.copy(SCRIPT.with_name("command_line.py"), folder)
    package = Path(crossvit.__file__).parent
    shutil.copytree(package, folder / "crossvit", ignore=shutil.ignore_patterns("__pycache__"))
    model.save_pretrained(folder / MODEL_OF_SPACE.name)
    processor.save_pretrained(folder / MODEL_OF_SPACE.name)
    requirements = [line for line in importlib.metadata.requires("crossvit") if "extra ==" not in line]
    requirements += ["matplotlib"]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    card = CARD.format(title=TITLE, gradio=importlib.metadata.version("gradio"), introduction=INTRODUCTION)
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"Wrote a Space to {folder}; hf upload <name> {folder} --repo-type space publishes it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a CrossViT; default: the quickstart's")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--max_megabytes", type=float, default=10, help="of an upload; default: %(default)s")
    parser.add_argument(
        "--keep_seconds", type=int, default=60, help="delete uploads that are so old, as often; default: %(default)s"
    )
    parser.add_argument(
        "--space", type=Path, metavar="FOLDER", help="write a Space there instead of starting the page"
    )
    args = parser.parse_args()
    if args.max_megabytes <= 0 or args.keep_seconds < 1:
        raise CommandError(f"--max_megabytes {args.max_megabytes:g} --keep_seconds {args.keep_seconds}: not so little")
    logging.disable_progress_bar()
    PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # twice as many are refused

    name = args.model or (str(MODEL_OF_SPACE) if MODEL_OF_SPACE.is_dir() else "")
    name = name or quickstart_model(SCRIPT.with_name("quickstart.py"))
    model, processor = load_checkpoint(name)
    if args.space:
        return write_space(model, processor, args.space)
    page = make_page(Explainer(model, processor, args.max_megabytes), args.keep_seconds)
    page.queue().launch(
        server_port=args.port, max_file_size=int(args.max_megabytes * 1e6), css=STYLE, footer_links=[], show_error=True
    )


if __name__ == "__main__":
    run(main)
