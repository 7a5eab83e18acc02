"""
The common tests of Transformers at work on CrossViT. Started by `run.py`, which puts them on the path.

Every override of a test says why a model of several branches, or one without text, needs it. Left out are the mixins
for text, speech, video, processors and experts, the one for memory, which has no tests, and the one for pipelines: it
calls tests of each task that are not distributed, and tests/test_auto_classes.py runs both pipelines.
"""

import base64
import copy
import importlib.util
import io
import multiprocessing
import subprocess
import sys
import tempfile
import types
import unittest
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM
from transformers.testing_utils import torch_device

from crossvit import (
    CrossViTBackbone,
    CrossViTConfig,
    CrossViTForImageClassification,
    CrossViTImageProcessor,
    CrossViTImageProcessorPil,
    CrossViTModel,
)
from crossvit.modeling_crossvit import CrossViTClassificationHead, CrossViTPatchEmbeddings


# What the tests import from modules that are not distributed


def provide(module: str, **names):
    """Stands in for `module`, with what the tests import from it."""
    sys.modules[module] = types.ModuleType(module)
    vars(sys.modules[module]).update(names)


# The processes of a test are forked from one that has imported this module: importing all takes longer than a test
multiprocessing.set_forkserver_preload([__name__])


def start_processes(function, args: tuple, nprocs: int):
    """Runs `function(rank, *args)` in `nprocs` processes."""
    torch.multiprocessing.start_processes(run_rank, (function, args), nprocs, start_method="forkserver")


def run_rank(rank: int, function, args: tuple):
    # A function of this module, since what is below must be in place before the module of `function` is imported
    function(rank, *args)


def run_in_group(rank: int, world_size: int, folder: str, function, args: tuple):
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    function(rank, *args)
    torch.distributed.destroy_process_group()


def run_distributed(world_size: int):
    """Decorates `function(rank, *args)` to run in `world_size` processes of one group."""

    def decorate(function):
        def run(*args):
            with tempfile.TemporaryDirectory() as folder:
                start_processes(run_in_group, (world_size, folder, function, args), world_size)

        return run

    return decorate


rows, columns = np.mgrid[:480, :640]
PHOTO = Image.fromarray(np.stack((rows % 256, columns % 256, (rows + columns) // 8), axis=-1).astype(np.uint8))
png = io.BytesIO()
PHOTO.save(png, "PNG")

provide("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
provide("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
provide(
    "tests.utils.test_configuration_utils",
    config_common_kwargs={
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["CrossViTModel"],
        "id2label": {0: "cat"},
        "label2id": {"cat": 0},
        "problem_type": "regression",
    },
)
provide("fetch_hub_objects_for_ci", url_to_local_path=lambda url: base64.b64encode(png.getvalue()).decode())
provide(
    "tests.distributed_testing_utils",
    run_distributed=run_distributed,
    _get_distributed_backend=lambda: "gloo",
    _get_distributed_device_type=lambda: "cpu",
    _get_rank_device=lambda rank: torch.device("cpu"),
    _set_rank_device=lambda rank: None,
    _start_rank_processes=start_processes,
)


from tests import (  # noqa: E402
    test_backbone_common,
    test_configuration_common,
    test_image_processing_common,
    test_modeling_common,
    test_tensor_parallel_mixin,
    test_training_mixin,
)


if importlib.util.find_spec("tests.test_fsdp_mixin"):
    from tests import test_fsdp_mixin
else:  # Transformers 5.10
    test_fsdp_mixin = types.SimpleNamespace(FSDPTesterMixin=type("FSDPTesterMixin", (), {}))

# The tests know the models of Transformers by name,
for mapping, model_class in {
    "MODEL_MAPPING_NAMES": CrossViTModel,
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": CrossViTForImageClassification,
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": CrossViTBackbone,
}.items():
    names = getattr(test_modeling_common, mapping)
    setattr(test_modeling_common, mapping, {**names, "crossvit": model_class.__name__})
# also in the script of a process that they start, where torchvision cannot be imported,
test_image_processing_common.subprocess = types.SimpleNamespace(
    run=lambda command, **kwargs: subprocess.run(
        [
            argument.replace("from transformers import", "import crossvit\nfrom transformers import")
            for argument in command
        ],
        **kwargs,
    )
)
# and run some for a few of them only, because they are slow
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None

# Processes can share the cores of a CPU, other devices they cannot
test_fsdp_mixin._get_available_fsdp_workers = lambda: 4
test_fsdp_mixin.SINGLE_PROCESS_DEVICES = {torch_device} - {"cpu"}

# Transformers 5.10 downloads the photo itself
test_image_processing_common.httpx = types.SimpleNamespace(
    get=lambda url, **kwargs: types.SimpleNamespace(content=png.getvalue())
)


class CrossViTForImageClassificationOfTokens(CrossViTForImageClassification):
    """Takes the tokens of a text as the pixels of an image: the tests of training and sharding only have text."""

    def forward(self, input_ids, labels=None, use_cache=None):
        # (batch, tokens) -> (batch, 3, 2, tokens / 2)
        pixel_values = (input_ids / self.config.vocab_size - 0.5).unflatten(1, (1, 2, -1)).expand(-1, 3, -1, -1)
        if labels is not None:
            labels = labels[:, 0] % self.num_labels
        return super().forward(pixel_values, labels=labels)


AutoModelForCausalLM.register(CrossViTConfig, CrossViTForImageClassificationOfTokens)


class CrossViTModelTester:
    """
    Two branches that differ in all sizes. Where the tests expect one number for all layers they look at the first
    hidden state or attention map: it is of the first branch.
    """

    causal_lm_class = CrossViTForImageClassificationOfTokens
    batch_size = 13
    is_training = True
    # As in JSON
    config_kwargs = {
        "image_size": [24, 32],
        "patch_size": [4, 8],
        "embed_dim": [16, 32],
        "depth": [[1, 0, 0], [0, 1, 0]],
        "num_heads": [2, 4],
        "mlp_ratio": [2.0, 2.0, 1.0],
    }
    hidden_size = 16
    num_attention_heads = 2
    seq_length = 1 + 6 * 6
    num_hidden_layers = 2  # with self-attention
    expected_num_hidden_layers = 6  # hidden states: embeddings and two stages, of each branch

    def get_config(self):
        return CrossViTConfig(**self.config_kwargs, vocab_size=99)  # of `causal_lm_class`

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": test_modeling_common.floats_tensor([self.batch_size, 3, 24, 24])}


class CrossViTModelTest(
    test_modeling_common.ModelTesterMixin,
    test_training_mixin.TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (CrossViTModel, CrossViTForImageClassification, CrossViTBackbone)
    model_tester = CrossViTModelTester()
    test_resize_embeddings = False  # no vocabulary
    test_resize_position_embeddings = True

    def test_config(self):
        test_configuration_common.ConfigTester(
            self, config_class=CrossViTConfig, has_text_modality=False, **self.model_tester.config_kwargs
        ).run_common_tests()

    def test_model_get_set_embeddings(self):
        # The input embeddings of an image are not an `nn.Embedding`
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), CrossViTPatchEmbeddings)

            embeddings = torch.nn.Identity()
            model.set_input_embeddings(embeddings)
            self.assertIs(model.get_input_embeddings(), embeddings)
            self.assertIsNone(model.get_output_embeddings())

    def test_resize_position_vector_embeddings(self):
        # The position embeddings of an image are those of a grid per branch, and interpolated instead of cut
        config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config)).to(torch_device)
            for image_size, tokens in (((32, 24), 40), [1 + 48, 1 + 25]), (((16, 8), 16), [1 + 8, 1 + 4]):
                model.resize_position_embeddings(image_size)
                self.assertEqual(model.config.image_size, image_size)
                self.assertEqual([positions.shape[1] for positions in model.get_position_embeddings()], tokens)
                model(**self._prepare_for_class(inputs_dict, model_class))

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        # The test looks for the weight of an `nn.Embedding`, the one of patch embeddings is one level deeper
        weight = property(lambda embeddings: embeddings.projection.weight)
        with patch.object(CrossViTPatchEmbeddings, "weight", weight, create=True):
            super().test_enable_input_require_grads_with_gradient_checkpointing()

    def test_can_load_ignoring_mismatched_shapes(self):
        # The test looks for one linear layer in the head, ours has a list of them, one for each branch
        def named_children(head):
            return ((f"heads.{name}", module) for name, module in head.heads.named_children())

        with patch.object(CrossViTClassificationHead, "named_children", named_children):
            super().test_can_load_ignoring_mismatched_shapes()

    # A classifier generates nothing
    test_tp_generation = None
    test_tp_generation_quantized = None

    def _get_model_modality(self):
        return "text"  # see `CrossViTForImageClassificationOfTokens`

    def _get_tiny_config(self):
        # The test makes the config tiny by attributes of text models, ours is
        config = self.model_tester.get_config()
        return type(config), config.to_diff_dict()


class CrossViTBackboneTest(test_backbone_common.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (CrossViTBackbone,)
    config_class = CrossViTConfig
    model_tester = CrossViTModelTester()

    def test_config(self):
        # Each stage has a feature map per branch, hence more names than `stem` and `stage1`
        config = CrossViTConfig()
        stages = ["stem", *(f"stage{stage}" for stage in range(1, config.num_hidden_layers + 1))]
        self.assertEqual(config.stage_names, [f"{stage}_{branch}" for stage in stages for branch in (0, 1)])
        self.assertLessEqual(set(config.out_features), set(config.stage_names))

        for out_features, out_indices, expected in (
            (None, None, [7]),
            (["stem_0", "stage1_1"], [0, 3], [0, 3]),
            (["stage1_0", "stage3_1"], None, [2, 7]),
            (None, [0, 2], [0, 2]),
        ):
            config = CrossViTConfig(out_features=out_features, out_indices=out_indices)
            self.assertEqual(config.out_features, [config.stage_names[index] for index in expected])
            self.assertEqual(config.out_indices, expected)

        with self.assertRaises(ValueError):
            CrossViTConfig(out_features=["stage1_0", "stage2_0"], out_indices=[0, 2])


class CrossViTImageProcessingTester:
    batch_size = 7
    num_channels = 3
    size = {"shortest_edge": 20}
    crop_size = {"height": 18, "width": 16}
    image_processing_classes = {"torchvision": CrossViTImageProcessor, "pil": CrossViTImageProcessorPil}

    def prepare_image_processor_dict(self):
        return {"size": self.size, "crop_size": self.crop_size}

    def prepare_image_inputs(self, batch_size=batch_size, **kwargs):
        return test_image_processing_common.prepare_image_inputs(batch_size, 30, 400, self.num_channels, **kwargs)

    def prepare_processor_inputs(self, **kwargs):
        return {"images": self.prepare_image_inputs(**kwargs)}

    def expected_output_image_shape(self, images):
        return self.num_channels, 18, 16


class CrossViTImageProcessingTest(test_image_processing_common.ImageProcessingTestMixin, unittest.TestCase):
    test_cast_dtype = True
    image_processing_classes = CrossViTImageProcessingTester.image_processing_classes
    image_processor_dict = CrossViTImageProcessingTester().prepare_image_processor_dict()

    def setUp(self):
        self.image_processor_tester = CrossViTImageProcessingTester()

    def test_call_numpy_4_channels(self):
        # Arrays are converted to RGB too, so this must be off; in Transformers 5.10 the test does not turn it off
        with patch.dict(self.image_processor_dict, do_convert_rgb=False):
            super().test_call_numpy_4_channels()
