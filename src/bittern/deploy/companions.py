"""What a folder holds beside weights: tokenizer, processors, pooling, prompts, licence; metadata; a model card."""

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from transformers import PreTrainedModel

from bittern.deploy.files import sort_metadata, tensor_files
from bittern.errors import first_line

COMPANIONS = (
    *("*token*.json", "vocab*", "merges.txt", "bpe.codes", "dict.txt", "*.model", "*.spm", "*.tiktoken", "*.jinja"),
    *("*processor*.json", "*_template.json", "normalizer.json", "generation_config.json", "LICENSE*", "NOTICE*"),
    *("modules.json", "*sentence*.json", "[1-9]_*/*"),  # of sentence-transformers: pooling, normalization, prompts
)
CARD, REPORT = "README.md", "bittern.json"  # the model card; what a job measured
CARD_TEXT = Path(__file__).parents[1] / "assets" / "card.md"
# By what a model reads first: what it needs to be used, and the files of which there must be one.
NEEDED = {
    "input_ids": ("tokenizer", ("tokenizer*.json", "vocab*", "*.model")),
    "pixel_values": ("image processor", ("*processor*.json",)),
    "input_features": ("feature extractor", ("*processor*.json",)),
}


def source_of(model: PreTrainedModel) -> str:
    """Return the folder or hub name that a model was loaded from; empty if it was not."""
    return str(getattr(model.config, "_name_or_path", "") or "")


def folder_of(source: str | Path, patterns: list[str] | None = None) -> Path | None:
    """Return the folder of a model; of one from the hub, that of these files, or of what is cached. None if neither."""
    if not source or os.path.isdir(source):
        return Path(source) if source else None
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=patterns is None))
    except Exception:  # huggingface_hub raises many kinds for names that are none, and without a network
        return None


def copy_companions(source: str | Path, folder: Path) -> None:
    """Copy what a model needs beside its weights from its folder, or the hub, to another one, if it is not there."""
    if (there := folder_of(source, [*COMPANIONS, CARD])) is None:
        return
    for file in {file for pattern in COMPANIONS for file in there.glob(pattern) if file.is_file()}:
        if not (copy := folder / file.relative_to(there)).exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def warn_of_missing(model: PreTrainedModel, source: str | Path, folder: Path, out: str | Path) -> None:
    """Say which companion of a saved model could not be found."""
    what, patterns = NEEDED.get(str(model.main_input_name), ("", ()))  # a list of names, where there are several
    if what != "tokenizer" and folder_of(source):  # only a tokenizer is made up, in silence, where there is none
        return
    if what and not any(any(folder.glob(pattern)) for pattern in patterns):
        why = f"{source} has none" if source else "the model was not loaded from a folder that has one"
        warnings.warn(f"{out} has no {what}: {why}; pipelines need one", stacklevel=3)


def write_card(model: PreTrainedModel, source: str | Path, folder: Path, report: Mapping[str, Any] | None) -> None:
    """Write a model card: how to load the model, what it was made from and how, sizes, and licence."""
    given, there = ModelCardData(), folder_of(source)
    try:
        given = ModelCard.load(str(there / CARD)).data if there and (there / CARD).exists() else given
    except Exception as error:  # whatever YAML the source has
        warnings.warn(f"{source}: its {CARD} cannot be read: {first_line(error)}", stacklevel=3)
    config = model.config.quantization_config
    on_hub = there is not None and not os.path.isdir(source)
    copied = ("license", "license_name", "license_link", "language", "pipeline_tag")
    kept = {key: value for key in copied if (value := given.get(key))}
    tags, base = ["bittern", config.recipe or "quantized"], str(source) if on_hub else given.get("base_model")
    data = ModelCardData(library_name="transformers", tags=tags, base_model=base, **kept)
    metrics = [(kind, report.get(kind)) for kind in ("float", "packed")] if report else []
    text = CARD_TEXT.read_text(encoding="utf-8").format(
        name=Path(source).name or type(model).__name__,
        state=config.state,
        cls=type(model).__name__,
        recipe=config.recipe or "its own; `bittern inspect` lists the formats",
        size=sum(file.stat().st_size for file in tensor_files(folder)) / 1e6,
        parameters=model.num_parameters(),
        source=(source if on_hub else Path(source).name) or "a model that was not loaded from a folder",
        licence=kept.get("license", "not known; that of the model it was made from holds"),
    )
    text += "".join(f"* Measured, {kind}: {values}\n" for kind, values in metrics if values)
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    max_shard_size: str = "50GB",
    **commit: Any,
) -> str:
    """Upload a packed model with all that it needs and its card, which transformers' own method replaces by a blank.

    commit: what `HfApi.upload_folder` takes, such as revision and commit_message. Returns the address of the commit.
    """
    api, source = HfApi(token=token), source_of(model)
    repo, there = api.create_repo(repo_id, private=private, exist_ok=True).repo_id, folder_of(source)
    with TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        sort_metadata(folder)
        copy_companions(source, folder)
        if there and (there / REPORT).exists():  # written by a job, with its figures
            shutil.copyfile(there / CARD, folder / CARD)
            shutil.copyfile(there / REPORT, folder / REPORT)
        else:
            write_card(model, source, folder, None)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, **commit))
