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
"""A web page on which visitors try a CrossViT on their own images: predictions and attention maps.

    pip install gradio
    python examples/app.py                                         # published weights
    python examples/app.py --model outputs/quickstart              # or another folder or model of the Hub
    python examples/app.py --model my-crossvit --space my-space    # writes a folder that is a Space of the Hub

Images are decoded in memory; uploaded files are deleted after one to two minutes.
"""

import argparse
import base64
import html
import importlib.metadata
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import load_checkpoint, run


if TYPE_CHECKING:
    import gradio as gr
    import PIL.Image

    from crossvit.interpretability import AttentionMap


SCRIPT = Path(__file__)
MODEL_OF_SPACE = SCRIPT.with_name("model")
DEFAULT_MODEL = str(MODEL_OF_SPACE) if MODEL_OF_SPACE.is_dir() else "timm/crossvit_15_dagger_240.in1k"
MAX_PIXELS = 50_000_000  # of an upload; a small file can hold many
CONCURRENT_VISITORS = 4
TITLE = "CrossViT attention maps"
INTRODUCTION = """\
# CrossViT attention maps

CrossViT processes an image at two scales, with small patches (branch 0) and with large ones (branch 1). In each stage
the class token of a branch attends to the patches of its own branch, then to those of the other (cross-attention).
Upload an image to see the predictions and what the class tokens attend to, in bright colors. Uploads are not kept.
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
The folder `crossvit` holds CrossViT for Transformers, `model` the model. The paper:
[arXiv:2103.14899](https://arxiv.org/abs/2103.14899).
"""
STYLE = """
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.maps figure { margin: 0; }
.maps img { width: 100%; }
.maps figcaption { text-align: center; }
"""


@dataclass
class Explanation:
    """
    What is kept of an image while its visitor is there.

    Args:
        image (`PIL.Image.Image`): a copy in the size in which it is displayed.
        maps (`list[list[dict[str, AttentionMap]]]`): by stage and by head, the mean of all heads first: by title.
        rollout (`AttentionMap`): over all stages.
    """

    image: "PIL.Image.Image"
    maps: "list[list[dict[str, AttentionMap]]]"
    rollout: "AttentionMap"


class Explainer:
    """Classifies images and draws their maps; can be shared by threads."""

    def __init__(self, model: Any, processor: Any, max_megabytes: float):
        from transformers import ImageClassificationPipeline

        model.set_attn_implementation("eager")  # once, as all threads read it
        self.model, self.processor, self.max_megabytes = model.eval(), processor, max_megabytes
        self.pipeline = ImageClassificationPipeline(model=model, image_processor=processor)

    def explain(self, path: str | None) -> tuple[dict[str, float] | None, Explanation | None]:
        """The scores of the top labels, and the maps, of an uploaded file."""
        import gradio as gr
        import PIL.Image
        from transformers.image_utils import load_image

        from crossvit.interpretability import AttentionMaps, display_size

        def refuse(message: str) -> tuple[None, None]:
            # A warning, as an error would leave the maps of the image before on the page
            gr.Warning(message, title="Refused")
            return None, None

        if path is None:  # The visitor removed the image
            return None, None
        if Path(path).stat().st_size > self.max_megabytes * 1e6:
            return refuse(f"The file is larger than {self.max_megabytes:g} MB.")
        try:
            image = load_image(PIL.Image.open(io.BytesIO(Path(path).read_bytes())))
        except Exception as error:  # of many types, by format
            reason = "not an image" if isinstance(error, PIL.UnidentifiedImageError) else error
            return refuse(f"This file cannot be read as an image: {Path(path).name}: {reason}")
        maps = AttentionMaps(self.model, self.processor, image)
        scores = {entry["label"]: entry["score"] for entry in self.pipeline.postprocess(maps.outputs, top_k=5)}
        heads = (None, *range(min(maps.config.num_heads)))
        stages = [[maps.class_token_maps(stage, head) for head in heads] for stage in range(len(maps.config.depth))]
        height, width = display_size(image)
        return scores, Explanation(image.resize((width, height)), stages, maps.rollout())

    def draw(self, explanation: Explanation | None, stage: int, head: int) -> str:
        """The maps of a stage, from 1, and of a head, from 1, or 0 for the mean of all heads, as HTML."""
        from crossvit.interpretability import overlay

        if explanation is None:
            return ""
        image = explanation.image
        pictures = {"image": image}
        maps = {"attention rollout\nover all stages": explanation.rollout, **explanation.maps[stage - 1][head]}
        for title, attention in maps.items():
            pictures[title] = overlay(image, attention.on_image(smooth=True, image_size=image.size[::-1]))
        figures = []
        for title, picture in pictures.items():
            # In the page itself: a file would have to be kept
            picture.save(content := io.BytesIO(), format="PNG")
            source, caption = base64.b64encode(content.getvalue()).decode(), html.escape(title.replace("\n", " "))
            figures.append(
                f'<figure><img alt="{caption}" src="data:image/png;base64,{source}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        return f'<div class="maps">{"".join(figures)}</div>'


def make_page(explainer: Explainer, keep_seconds: int) -> "gr.Blocks":
    import gradio as gr

    config = explainer.model.config
    # How often to look for uploads to delete, and how old they are then
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(keep_seconds, keep_seconds)) as page:
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
                    0, min(config.num_heads), value=0, step=1, label="Head (0: the mean of all heads)", elem_id="head"
                )
            labels = gr.Label(num_top_classes=5, label="Top 5", elem_id="labels")
        maps = gr.HTML(elem_id="maps")

        drawing: dict[str, Any] = {
            "fn": explainer.draw,
            "inputs": [explanation, stage, head],
            "outputs": maps,
            "show_progress": "hidden",
            "concurrency_limit": CONCURRENT_VISITORS,
        }
        upload.change(
            explainer.explain, upload, [labels, explanation], api_name="explain", concurrency_limit=CONCURRENT_VISITORS
        ).then(**drawing, api_name="draw")
        # Of a slider that moves on while its maps are drawn, only the last position counts
        gr.on([stage.change, head.change], **drawing, trigger_mode="always_last", api_name=False)
    return page


def write_space(model: Any, processor: Any, folder: Path) -> None:
    """Writes what a Space needs: this page, the package, the model, the requirements and the card."""
    import crossvit

    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"--space {folder}: is not empty; name a new folder")
    package = Path(crossvit.__file__).parent
    shutil.copytree(package, folder / "crossvit", ignore=shutil.ignore_patterns("__pycache__"))
    for script in (SCRIPT, SCRIPT.with_name("command_line.py")):
        shutil.copy(script, folder)
    model.save_pretrained(folder / MODEL_OF_SPACE.name)
    processor.save_pretrained(folder / MODEL_OF_SPACE.name)
    requirements = [line for line in importlib.metadata.requires("crossvit") if "extra ==" not in line]
    (folder / "requirements.txt").write_text("\n".join([*requirements, "matplotlib"]) + "\n", encoding="utf-8")
    card = CARD.format(title=TITLE, gradio=importlib.metadata.version("gradio"), introduction=INTRODUCTION)
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"Wrote a Space to {folder}; hf upload <name> {folder} --repo-type space publishes it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id of a CrossViT; default: %(default)s")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--max_megabytes", type=float, default=10, help="of an upload; default: %(default)s")
    parser.add_argument(
        "--keep_seconds", type=int, default=60, help="age at which uploads are deleted; default: %(default)s"
    )
    parser.add_argument(
        "--space", type=Path, metavar="FOLDER", help="write a Space there instead of starting the page"
    )
    args = parser.parse_args()
    if args.max_megabytes <= 0 or args.keep_seconds < 1:
        parser.error("--max_megabytes must be positive and --keep_seconds at least 1")

    # After the options, as these imports take seconds
    import PIL.Image
    from transformers.utils import logging

    logging.disable_progress_bar()
    PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses images of more than twice as many
    model, processor = load_checkpoint(args.model)
    if args.space:
        return write_space(model, processor, args.space)
    page = make_page(Explainer(model, processor, args.max_megabytes), args.keep_seconds)
    page.queue().launch(
        server_port=args.port, max_file_size=int(args.max_megabytes * 1e6), css=STYLE, footer_links=[], show_error=True
    )


if __name__ == "__main__":
    run(main)
