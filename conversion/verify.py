"""
Repeats the proof of a conversion: whether a checkpoint of Transformers has the weights of a reference and computes the
same logits as timm's model.

    python conversion/verify.py checkpoints/crossvit_15 --against crossvit_15
    python conversion/verify.py me/crossvit_15 --against crossvit_15_224.pth

Exits with status 1 if anything differs. The names of the classes and the image processor are not compared.
"""

import argparse

import torch
from architecture import differences
from checkpoints import find_checkpoint, open_checkpoint, reference_tensors
from commands import ConversionError, run, some
from proof import check_differences, in_words, largest_differences
from reference_checkpoint import add_reference_options, read_reference


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder or repository of the Hub with a CrossViTForImageClassification")
    parser.add_argument("--checkpoint-revision", help="branch, tag or commit of the checkpoint's repository")
    parser.add_argument("--against", metavar="SOURCE", required=True, help="as in convert_crossvit_to_hf.py")
    add_reference_options(parser)
    options = parser.parse_args()

    model = open_checkpoint(find_checkpoint(options.checkpoint, options.checkpoint_revision))
    reference = read_reference(options.against, options)
    if differing := differences(model.config, reference.config):
        raise ConversionError(f"the architectures differ: {'; '.join(differing)}")
    if model.config.num_labels != reference.config.num_labels:
        raise ConversionError(
            f"the checkpoint has {model.config.num_labels} classes, the source {reference.config.num_labels}"
        )
    tensors = reference_tensors(model)
    if different := [name for name, tensor in reference.tensors.items() if not same_bits(tensors[name], tensor)]:
        raise ConversionError(f"{len(different)} of {len(tensors)} tensors differ: {some(different)}")
    print(f"{options.checkpoint}: the {len(tensors)} tensors are those of {reference.source}, bit by bit")

    found = largest_differences(model, reference.tensors, reference.source.timm_config)
    check_differences(found)
    print(in_words(found))


def same_bits(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.dtype == other.dtype and torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))


if __name__ == "__main__":
    run(main)
