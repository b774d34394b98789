"""Files that older versions wrote: they load for ever, give the same outputs, and are written again unchanged."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

import bittern
from bittern.deploy.bits import unpack_codes
from bittern.deploy.packed import PackedLayer
from helpers import outputs

FORMAT1 = Path(__file__).parent / "data" / "format1"  # see make.py there
FOLDERS = sorted(folder.name for folder in FORMAT1.iterdir() if folder.is_dir())


def example(folder: Path, part: str) -> dict[str, Tensor]:
    """A part of what was written beside a model: `in`, `out` or `codes`."""
    tensors = load_file(folder.with_suffix(".safetensors"))
    return {key.removeprefix(f"{part}."): t for key, t in tensors.items() if key.startswith(f"{part}.")}


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, from one file or several."""
    return {key: t for file in folder.glob("model*.safetensors") for key, t in load_file(file).items()}


def read(folder: Path, how: str) -> hf.PreTrainedModel:
    """A model by `bittern.load`, or by the class that its config.json names and transformers alone."""
    if how == "bittern":
        return bittern.load(folder)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    automatic = {
        "ForSequenceClassification": hf.AutoModelForSequenceClassification,
        "ForImageClassification": hf.AutoModelForImageClassification,
        "LMHeadModel": hf.AutoModelForCausalLM,
        "ForConditionalGeneration": hf.AutoModelForSeq2SeqLM,
    }
    kind = next(automatic[end] for end in automatic if architecture.endswith(end))
    return kind.from_pretrained(folder)


def test_all_are_there() -> None:
    """Packed and simulated, in one file and several, with tied weights and with names of their own."""
    assert len(FOLDERS) == 7
    assert all(any(word in name for name in FOLDERS) for word in ("simulated", "sharded", "tied", "renamed"))


@pytest.mark.parametrize("how", ["bittern", "transformers"])
@pytest.mark.parametrize("name", FOLDERS)
def test_loads_for_ever(name: str, how: str) -> None:
    """The codes are the ones that were written, and the outputs those that were given then.

    No activation of these batches lies within 2e-3 of a step of the middle between two codes, so every machine has the
    same codes, and what is left is the rounding of float32 in less than a dozen sums of at most 48 numbers, one after
    the other: some 2⁻²⁴ · √48 each, together below 1e-5 of the largest number.
    """
    folder = FORMAT1 / name
    model = read(folder, how)
    for layer, codes in example(folder, "codes").items():
        packed = model.get_submodule(layer)
        assert isinstance(packed, PackedLayer)
        assert torch.equal(
            unpack_codes(packed.weight_codes, packed.weight_shape[1], packed.weight_format), codes.float()
        )
    expected, found = example(folder, "out"), outputs(model.eval(), example(folder, "in"))
    assert expected
    for output, tensor in expected.items():
        assert (found[output] - tensor).abs().max() < 1e-5 * tensor.abs().max()


@pytest.mark.parametrize("name", FOLDERS)
def test_written_again(name: str, tmp_path: Path) -> None:
    """Saving what was loaded writes the same tensors under the same names, in the same type."""
    bittern.save(bittern.load(FORMAT1 / name), tmp_path / "again")
    before, after = tensors(FORMAT1 / name), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[key]) and t.dtype == after[key].dtype for key, t in before.items())
