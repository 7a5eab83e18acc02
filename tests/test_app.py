"""The web page, in a headless Chromium."""

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
from examples_in_process import EXAMPLES
from huggingface_hub import SpaceCard
from image_folders import image_bytes
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor


pytestmark = pytest.mark.app
TIMEOUT = 30_000  # milliseconds, of what takes one or two seconds on idle cores
# A new browser must not use the network to look for updates
CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture
def small_config(request, small_config):
    """Two stages, or as many as the test asks for."""
    small_config.depth = small_config.depth[: getattr(request, "param", 2)]
    small_config.id2label = {number: f"class <{number}>" for number in range(5)}
    return small_config


@pytest.fixture
def images(tmp_path) -> list[Path]:
    """Three images of different colors and sizes."""
    files = []
    for number, size in enumerate(((300, 200), (120, 240), (90, 90))):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
        files.append(tmp_path / f"image {number}.png")
        PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.NEAREST).save(files[-1])
    return files


@pytest.fixture
def serve(tmp_path):
    """Starts the page and returns its address and process."""
    processes = []

    def start(script: Path, *arguments, **environment) -> tuple[str, subprocess.Popen]:
        (tmp_path / "uploads").mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(tmp_path / "uploads"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        for line in process.stdout:
            if found := re.search(r"Running on local URL:\s*(\S+)", line):
                return found[1], process
        raise AssertionError("the page did not start")

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # which the other tests do without

    executable = shutil.which("chromium") or shutil.which("google-chrome")
    assert executable, "install Chromium (chromium of Debian or Ubuntu)"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


def open_page(browser, address: str):
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.wait_for_selector("#upload input[type=file]", state="attached")
    return page


def upload(page, file: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files(file)


def sources(page) -> list[str]:
    page.wait_for_selector("#maps .maps img")
    return page.eval_on_selector_all("#maps .maps img", "images => images.map(image => image.src)")


def wait_for_other_maps(page, before: list[str]) -> list[str]:
    end = time.monotonic() + TIMEOUT / 1000
    while (now := sources(page)) == before:
        assert time.monotonic() < end, "the maps did not change"
        time.sleep(0.1)
    return now


def set_slider(page, name: str, value: int) -> None:
    number = page.locator(f"#{name} input[type=number]")
    number.fill(str(value))
    number.press("Enter")


def test_page_shows_labels_and_maps_and_refuses_large_files(serve, browser, checkpoint, images, tmp_path):
    address, process = serve(EXAMPLES / "app.py", "--model", checkpoint, "--max_megabytes", "0.5", "--keep_seconds", 2)
    page = open_page(browser, address)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))

    upload(page, images[0])
    first = sources(page)
    # The image, the rollout, self-attention and cross-attention of two branches
    assert len(first) == len(set(first)) == 6
    captions = page.locator("#maps figcaption").all_inner_texts()
    assert captions[0] == "your image" and "1x uniform attention or less, where the image stays" in captions[-1]
    assert re.fullmatch(r"attention rollout over all stages, max \d+\.\dx", captions[1])
    assert re.fullmatch(r"branch 0 \(6x6 patches\) self-attention, max \d+\.\dx", captions[2])
    labels = page.locator("#labels").inner_text()
    assert len(set(re.findall(r"class <\d>", labels))) == 5 and "%" in labels

    set_slider(page, "stage", 1)
    earlier = wait_for_other_maps(page, first)
    # The image and the rollout do not depend on the stage
    assert [one == other for one, other in zip(first, earlier)] == [True, True, False, False, False, False]
    set_slider(page, "head", 2)
    one_head = wait_for_other_maps(page, earlier)
    assert [one == other for one, other in zip(earlier, one_head)] == [True, True, False, False, False, False]
    page.screenshot(path=tmp_path / "page.png", full_page=True)

    # A file that is refused replaces the image, whose maps must not stay. The message stays beside the file
    page.reload()
    page.wait_for_selector("#upload input[type=file]", state="attached")
    upload(page, images[0])
    sources(page)
    page.get_by_label("Clear").first.click()
    page.wait_for_selector("#upload input[type=file]", state="attached")
    (tmp_path / "large.png").write_bytes(images[0].read_bytes() + bytes(600_000))
    upload(page, tmp_path / "large.png")
    page.locator("#notice", has_text="Refused: The file is larger than 0.5 MB").wait_for()
    page.wait_for_function("!document.querySelector('#maps img')")
    assert not page.locator(".toast-body").is_visible()
    page.get_by_label("Clear").first.click()
    page.wait_for_function("!document.querySelector('#notice').innerText.trim()")

    # The page still works, and no upload is kept
    page.reload()
    upload(page, images[1])
    assert len(sources(page)) == 6
    end = time.monotonic() + 20
    while kept := [file for file in (tmp_path / "uploads").rglob("*") if file.is_file()]:
        assert time.monotonic() < end, kept
        time.sleep(0.2)
    before = sources(page)
    set_slider(page, "stage", 1)
    wait_for_other_maps(page, before)  # which does not need the file any more
    assert not problems
    page.close()

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in output, output


def test_page_names_its_model_and_has_examples(serve, browser, checkpoint, images):
    address, _ = serve(EXAMPLES / "app.py", "--model", checkpoint)
    page = open_page(browser, address)
    assert page.locator("#model").inner_text().startswith("Model: checkpoint. It has 5 classes, such as: class <0>;")
    texts = ("h1", "#model .prose", "#notice .prose", "#maps .prose")
    assert len({page.locator(text).bounding_box()["x"] for text in texts}) == 1  # none is indented
    examples = page.locator(".example img")
    assert examples.count() == 2
    upload(page, images[0])
    maps = sources(page)
    for number in range(2):
        page.get_by_text("Try it").nth(number).click()
        maps = wait_for_other_maps(page, maps)
        # The maps are those of the example, and not of a file that still seems to be uploaded
        assert page.locator("#maps img").first.get_attribute("alt") == "your image"
        page.wait_for_selector("#upload input[type=file]", state="attached")
    page.close()

    with urllib.request.urlopen(f"{address}/gradio_api/info") as response:
        assert set(json.load(response)["named_endpoints"]) == {"/explain", "/draw"}


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(EXAMPLES / "app.py"))


@pytest.fixture(scope="module")
def explainer(script):
    """Of crossvit_15, without the page."""
    return script["Explainer"](CrossViTForImageClassification(CrossViTConfig()), CrossViTImageProcessor(), 10)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"not an image", "not an image of the formats JPEG, PNG"),
        (b"", "not an image of the formats JPEG, PNG"),
        (image_bytes(format="EPS"), "not an image of the formats JPEG, PNG"),
        (image_bytes(size=(90, 90))[:-60], r"cannot be read as an image \(.*truncated"),
        (image_bytes(size=(1, 100_000)), "1x100000 pixels .* less extreme aspect ratio"),
        (bytes(10_000_001), "larger than 10 MB"),
    ],
    ids=["text", "empty", "eps", "truncated", "thin", "large"],
)
def test_refused_files_have_a_message(explainer, content, message):
    scores, explanation, notice, page = explainer.explain(content, 3, 0)
    assert scores is None and explanation is None and "<img" not in page
    assert re.search(f"Refused:.*{message}", notice)


def test_memory_of_visitors_is_bounded(script, explainer):
    """What is kept for a visitor: the arrays, the image, and the figures, which Gradio keeps with the page."""
    photo = (Path(sklearn.datasets.__file__).parent / "images" / "china.jpg").read_bytes()
    scores, explanation, notice, page = explainer.explain(photo, 3, 0)
    assert len(scores) == 2 and not notice and page.count("<img") == 7
    attentions = [attention for heads in explanation.maps for maps in heads for attention in maps.values()]
    assert len(attentions) == 3 * (1 + 6) * 5
    arrays = {id(patches): patches for attention in attentions for patches in attention.patches.values()}
    # The rollout is the same in all stages and heads
    assert len(arrays) == 2 + 3 * (1 + 6) * 4
    assert all(array.base is None for array in arrays.values())
    held = sum(array.nbytes for array in arrays.values()) + len(explanation.image)
    # 51 kB of arrays, 31 kB of the image and 127 kB of the page were measured
    assert 300 * (held + len(page)) < 100e6
    assert script["KEPT_VISITORS"] <= 300 and script["KEPT_SECONDS"] <= 3600


def test_concurrent_visitors_see_their_own_images(serve, browser, checkpoint, images):
    address, _ = serve(EXAMPLES / "app.py", "--model", checkpoint)
    pages = [open_page(browser, address) for _ in images]
    for page, image in zip(pages, images):
        upload(page, image)
    together = [sources(page) for page in pages]
    assert len({source for maps in together for source in maps}) == 6 * len(images)
    for maps, image in zip(together, images):
        page = open_page(browser, address)
        upload(page, image)
        assert sources(page) == maps
        page.close()
    for page in pages:
        page.close()


def closure(requirements: list[str]) -> set[str]:
    """The installed distributions that requirements bring, by their canonical names."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        try:
            dependencies = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        for text in dependencies:
            dependency = Requirement(text)
            marker, extras = dependency.marker, ("", *requirement.extras)
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(dependency)
    return found


@pytest.mark.parametrize("small_config", [1], indirect=True, ids=["one stage"])
def test_space_needs_only_its_folder(serve, browser, example, failure, checkpoint, images, tmp_path):
    space = tmp_path / "space"
    assert str(space) in example("app", "--model", checkpoint, "--space", space)[0]
    names = {path.name for path in space.iterdir()}
    assert names == {
        "LICENSE", "NOTICE", "README.md", "app.py", "common", "crossvit", "model", "requirements.txt"
    }  # fmt: skip
    for name in ("LICENSE", "NOTICE"):
        assert (space / name).read_text() == (EXAMPLES.parent / name).read_text()
    card = SpaceCard.load(space / "README.md").data
    assert (card.sdk, card.app_file, card.license) == ("gradio", "app.py", "apache-2.0")
    requirements = (space / "requirements.txt").read_text()
    assert "transformers<6,>=5." in requirements and "extra" not in requirements and "matplotlib" in requirements
    shutil.rmtree(checkpoint)

    # With the packages that the requirements and Gradio bring, and no others
    brought = {"crossvit", *closure(["gradio", *requirements.splitlines()])}
    blocked = [
        name for name, owners in packages_distributions().items() if brought.isdisjoint(map(canonicalize_name, owners))
    ]
    assert {"datasets", "timm"} <= set(blocked)
    (tmp_path / "site").mkdir()
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in blocked)]
    (tmp_path / "site" / "sitecustomize.py").write_text("\n".join(lines))
    address, _ = serve(space / "app.py", PYTHONPATH=str(tmp_path / "site"))
    page = open_page(browser, address)
    upload(page, images[0])
    assert len(sources(page)) == 6
    assert page.locator("#head").is_visible() and not page.locator("#stage").is_visible()
    assert "Model: checkpoint." in page.locator("#model").inner_text()
    page.close()

    assert f"--space {space}: is not empty" in failure("app", "--model", space / "model", "--space", space)


def test_missing_model_is_named(failure, tmp_path):
    assert "typo: not a CrossViT checkpoint, locally or on the Hub" in failure("app", "--model", tmp_path / "typo")


@pytest.mark.parametrize(
    "metadata",
    [{"license": "cc-by-nc-4.0"}, {"license": "other", "license_name": "own", "license_link": "LICENSE.md"}],
)
def test_space_has_the_license_of_its_model(example, checkpoint, metadata, tmp_path):
    card = "".join(f"{key}: {value}\n" for key, value in metadata.items())
    (checkpoint / "README.md").write_text(f"---\n{card}---\n\n# A model\n")
    example("app", "--model", checkpoint, "--space", tmp_path / "space")
    assert metadata.items() <= SpaceCard.load(tmp_path / "space" / "README.md").data.to_dict().items()
