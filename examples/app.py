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
"""A web page where visitors can try a CrossViT on their own images: predictions and attention maps.

    pip install -e ".[app]"
    python examples/app.py                                         # published weights
    python examples/app.py --model outputs/photos                  # or another folder or model of the Hub
    python examples/app.py --model my-crossvit --space my-space    # writes a folder that is a Space of the Hub

Images are decoded in memory. Uploaded files are deleted after one to two minutes. The image and maps on the
page are deleted after fifteen minutes, or once a hundred more visitors have come.
"""

import argparse
import base64
import contextlib
import dataclasses
import functools
import html
import importlib.metadata
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import command_line
from common.command_line import load_checkpoint, run_command
from common.images import open_image


if TYPE_CHECKING:
    import gradio as gr
    import PIL.Image

    from crossvit.interpretability import AttentionMap


SCRIPT = Path(__file__)
COMMON_FILES = ("command_line.py", "errors.py", "images.py")  # that this page imports
MODEL_OF_SPACE = SCRIPT.with_name("model")
DEFAULT_MODEL = str(MODEL_OF_SPACE) if MODEL_OF_SPACE.is_dir() else command_line.DEFAULT_MODEL
MAX_PIXELS = 50_000_000  # of an upload; a small file can hold many
CONCURRENT_VISITORS, WAITING_VISITORS = 4, 50
# What is kept for visitors until later ones come, or for this time. With crossvit_15 it was 0.2 MB for each
KEPT_VISITORS, KEPT_SECONDS = 100, 900
TITLE = "CrossViT attention maps"
INTRODUCTION = """\
CrossViT processes an image at two scales, with small patches (branch 0) and with large ones (branch 1). In each stage
the class token of a branch attends to the patches of its own branch, then to those of the other (cross-attention).
Upload an image to see the predictions and what the class tokens attend to, in bright colors. Uploaded files are
deleted after one to two minutes.
"""
SPACE_CARD = """\
---
{metadata}
---

# {title}

{introduction}
The folder `crossvit` holds CrossViT for Transformers, which is under the Apache License 2.0 as this page is; `model`
holds the model, under the license above. The paper: [arXiv:2103.14899](https://arxiv.org/abs/2103.14899).
"""
STYLE = """
.html-container { padding: 0 !important; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.maps figure { margin: 0; }
.maps img { width: 100%; }
.maps figcaption, .bar figcaption, .example { text-align: center; text-wrap: balance; }
.bar img { display: block; margin: 1rem auto 0; height: 1rem; width: 20rem; }
.example img { display: block; margin: auto; height: 5rem; }
.example figcaption { font-size: small; }
"""


@dataclasses.dataclass
class Explanation:
    """What is kept of an image while its visitor is there."""

    image: bytes  # encoded, in the size in which it is displayed
    maps: "list[list[dict[str, AttentionMap]]]"  # by stage and by head, the mean of all heads first: by title


def compact(maps: "dict[str, AttentionMap]") -> "dict[str, AttentionMap]":
    """Copies that are precise enough for display. The maps themselves may be views, which keep those of all layers."""
    return {
        title: dataclasses.replace(
            attention, patches={branch: shares.astype("float16") for branch, shares in attention.patches.items()}
        )
        for title, attention in maps.items()
    }


def encode(image: "PIL.Image.Image") -> bytes:
    # Gradio keeps the figures of each visitor's page; as PNG they would be twelve times as large
    image.save(content := io.BytesIO(), format="WEBP", quality=80)
    return content.getvalue()


def figure(content: bytes, caption: str, style: str = "") -> str:
    """HTML of an image and its caption."""
    # In the page itself: a file would have to be kept
    source, caption = base64.b64encode(content).decode(), html.escape(caption.replace("\n", " "))
    return (
        f'<figure class="{style}"><img alt="{caption}" src="data:image/webp;base64,{source}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def color_bar() -> str:
    """HTML that says what the colors of the maps mean."""
    import numpy as np
    import PIL.Image

    from crossvit.interpretability import overlay
    from crossvit.interpretability.plotting import MAX_HEAT

    colors = overlay(PIL.Image.new("L", (1, 1), 255), np.geomspace(1, MAX_HEAT, 256)[None])
    caption = f"from 1x uniform attention or less, where the image stays as it is, to {MAX_HEAT}x"
    return figure(encode(colors), caption, "bar")


class Explainer:
    """Classifies images and draws their maps; can be shared by threads."""

    def __init__(self, model: Any, processor: Any, max_megabytes: float):
        from transformers import ImageClassificationPipeline

        model.set_attn_implementation("eager")  # once, as all threads read it
        self.model, self.processor, self.max_megabytes = model.eval(), processor, max_megabytes
        self.pipeline = ImageClassificationPipeline(model=model, image_processor=processor)

    def explain(self, upload: bytes | None, stage: int, head: int) -> tuple[dict | None, Explanation | None, str, str]:
        """Of an uploaded file: the scores of the top labels, the explanation, why it was refused, and its maps."""
        from crossvit.interpretability import AttentionMaps, display_size

        if upload is None:  # The visitor removed the image
            return None, None, "", self.draw(None, stage, head)
        try:
            if len(upload) > self.max_megabytes * 1e6:
                raise ValueError(f"The file is larger than {self.max_megabytes:g} MB.")
            image = open_image(io.BytesIO(upload), "the file")
            maps = AttentionMaps(self.model, self.processor, image)
        except ValueError as error:
            notice = f'<p role="alert"><b>Refused:</b> {html.escape(str(error))}</p>'
            return None, None, notice, self.draw(None, stage, head)
        scores = {entry["label"]: entry["score"] for entry in self.pipeline.postprocess(maps.outputs, top_k=5)}
        rollout = compact({"attention rollout\nover all stages": maps.rollout()})
        all_maps = [
            [
                {**rollout, **compact(maps.class_token_maps(stage_index, head_index))}
                for head_index in (None, *range(min(maps.config.num_heads)))
            ]
            for stage_index in range(len(maps.config.depth))
        ]
        height, width = display_size(image)
        explanation = Explanation(encode(image.resize((width, height))), all_maps)
        return scores, explanation, "", self.draw(explanation, stage, head)

    def draw(self, explanation: Explanation | None, stage: int, head: int) -> str:
        """The maps of a stage, from 1, and of a head, from 1, or 0 for the mean of all heads, as HTML."""
        import PIL.Image

        from crossvit.interpretability import draw_attention

        if explanation is None:
            return f"Upload an image to see its maps. They are forgotten after {KEPT_SECONDS // 60} minutes."
        image = PIL.Image.open(io.BytesIO(explanation.image))
        figures = [figure(explanation.image, "your image")]
        for title, attention in explanation.maps[stage - 1][head].items():
            picture, peak = draw_attention(image, attention)
            figures.append(figure(encode(picture), f"{title}, {peak}"))
        return f'<div class="maps">{"".join(figures)}</div>{color_bar()}'


def example_images(labels: list[str]) -> dict[str, "PIL.Image.Image"]:
    """Two images to try, which ship with scikit-learn: digits where these are the labels, otherwise photos."""
    import PIL.Image
    import sklearn.datasets

    if labels == list("0123456789"):
        digits = (sklearn.datasets.load_digits().images * 255 / 16).astype("uint8")  # the first ten are in order
        return {f"a {digit}": PIL.Image.fromarray(digits[digit]) for digit in (3, 6)}
    titles = ("a temple (danielbuechele, CC BY 2.0)", "a flower (vultilion, CC BY 2.0)")
    return dict(zip(titles, map(PIL.Image.fromarray, sklearn.datasets.load_sample_images().images)))


def make_page(explainer: Explainer, name: str, keep_seconds: int) -> "gr.Blocks":
    """The page of the model called `name`. Every `keep_seconds`, uploads older than `keep_seconds` are deleted."""
    import gradio as gr

    config = explainer.model.config
    labels = list(config.id2label.values())
    some_labels = "; ".join(labels[:: -(-len(labels) // 5)])
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(keep_seconds, keep_seconds)) as page:
        gr.Markdown(f"# {TITLE}\n\n{INTRODUCTION}")
        gr.HTML(html.escape(f"Model: {name}. It has {len(labels)} classes, such as: {some_labels}"), elem_id="model")
        explanation = gr.State(time_to_live=KEPT_SECONDS)
        with gr.Row():
            with gr.Column():
                # Read by this script, so that every refusal has its message in the page
                upload = gr.File(
                    label=f"Image, at most {explainer.max_megabytes:g} MB", type="binary", elem_id="upload"
                )
                notice = gr.HTML(elem_id="notice")
                with gr.Row():
                    examples = {}
                    for title, image in example_images(labels).items():
                        with gr.Column(min_width=80):
                            gr.HTML(figure(content := encode(image), title), elem_classes="example")
                            examples[gr.Button("Try it", size="sm")] = content
                stages = len(config.depth)
                stage = gr.Slider(
                    1, max(2, stages), value=stages, step=1, label="Stage", elem_id="stage", visible=stages > 1
                )
                head = gr.Slider(
                    0, min(config.num_heads), value=0, step=1, label="Head (0: the mean of all heads)", elem_id="head"
                )
            scores = gr.Label(num_top_classes=5, label="Top 5", elem_id="labels")
        maps = gr.HTML(explainer.draw(None, stages, 0), elem_id="maps")

        events: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": CONCURRENT_VISITORS}
        # By default Gradio ignores an event, such as an upload, while another one, such as the removal of the image
        # before or of a slider that moves on, is not finished
        events["trigger_mode"] = "always_last"
        explained = [scores, explanation, notice, maps]
        gr.on([upload.upload, upload.clear], explainer.explain, [upload, stage, head], explained, **events)
        for button, content in examples.items():
            button.click(
                functools.partial(explainer.explain, content),
                [stage, head],
                explained,
                api_visibility="private",
                **events,
            ).then(lambda: None, outputs=upload, api_visibility="private")
        gr.on(
            [stage.change, head.change],
            explainer.draw,
            [explanation, stage, head],
            maps,
            show_progress="hidden",
            **events,
        )
    return page


def find_license(model: str) -> dict[str, Any]:
    """The license on the model card in a folder or on the Hub, or else that of this package."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import RemoteEntryNotFoundError

    card = Path(model, "README.md")
    entries: dict[str, Any] = {}
    if card.is_file() or not Path(model).is_dir():
        with contextlib.suppress(RemoteEntryNotFoundError):  # a model of the Hub without a card
            entries = ModelCard.load(card if card.is_file() else model).data.to_dict()
    named = {key: entry for key, entry in entries.items() if key in ("license", "license_name", "license_link")}
    return named or {"license": "apache-2.0"}


def write_space(model: Any, processor: Any, name: str, license: dict[str, Any], folder: Path) -> None:
    """Writes what a Space needs: this page, the package, the model, the requirements, the licenses and the card."""
    from huggingface_hub import SpaceCardData

    import crossvit

    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"--space {folder}: is not empty; name a new folder")
    package = Path(crossvit.__file__).parent
    shutil.copytree(package, folder / "crossvit", ignore=shutil.ignore_patterns("__pycache__"))
    licenses = [file.locate() for file in importlib.metadata.files("crossvit") if file.name in ("LICENSE", "NOTICE")]
    for file in (SCRIPT, *licenses):
        shutil.copy(file, folder)
    (folder / "common").mkdir()
    for shared in COMMON_FILES:
        shutil.copy(SCRIPT.with_name("common") / shared, folder / "common")
    model.save_pretrained(folder / MODEL_OF_SPACE.name)
    processor.save_pretrained(folder / MODEL_OF_SPACE.name)
    requirements = [line for line in importlib.metadata.requires("crossvit") if "extra ==" not in line]
    requirements += ["matplotlib", "scikit-learn"]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    card = SpaceCardData(
        title=TITLE,
        emoji="🔎",
        colorFrom="blue",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=importlib.metadata.version("gradio"),
        app_file=SCRIPT.name,
        model_name=name,
        **license,
    )
    text = SPACE_CARD.format(metadata=card.to_yaml(), title=TITLE, introduction=INTRODUCTION)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"Wrote a Space to {folder}; hf upload <name> {folder} --repo-type space publishes it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub ID of a CrossViT; default: %(default)s")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--max_megabytes", type=float, default=10, help="of an upload; default: %(default)s")
    parser.add_argument("--keep_seconds", type=int, default=60, help="age of uploads to delete; default: %(default)s")
    parser.add_argument("--space", type=Path, metavar="FOLDER", help="write a Space there instead of starting")
    args = parser.parse_args()
    if args.max_megabytes <= 0 or args.keep_seconds < 1:
        parser.error("--max_megabytes must be positive and --keep_seconds at least 1")

    # After the options, as these imports take seconds
    import PIL.Image
    from huggingface_hub import SpaceCard

    PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses images of more than twice as many
    model, processor = load_checkpoint(args.model)
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    if args.model == str(MODEL_OF_SPACE):
        name = SpaceCard.load(SCRIPT.with_name("README.md")).data.get("model_name", name)
    if args.space:
        return write_space(model, processor, name, find_license(args.model), args.space)
    page = make_page(Explainer(model, processor, args.max_megabytes), name, args.keep_seconds)
    page.queue(max_size=WAITING_VISITORS).launch(
        server_port=args.port,
        # Files of a little more than is allowed arrive, so that they get their message
        max_file_size=int(4 * args.max_megabytes * 1e6),
        state_session_capacity=KEPT_VISITORS,
        css=STYLE,
        footer_links=[],
        show_error=True,
    )


if __name__ == "__main__":
    run_command(main)
