"""What travels with a model: tokenizers, processors, pooling; and the card that says how to load it."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from huggingface_hub import HfApi, ModelCard, RepoUrl

import bittern
from bittern.deploy.companions import source_of
from bittern.deploy.store import float_bytes
from families import SUPPORTED
from material import save_text_model


def sentence_model(folder: Path) -> Path:
    """A text model with what sentence-transformers keeps beside it, a licence, and files that are no companions."""
    save_text_model(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "modules.json").write_text("[]")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "find: "}}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    (folder / "notes.txt").write_text("mine")
    (folder / "optimizer.bin").write_bytes(b"no companion")
    return folder


def test_companions_travel(tmp_path: Path) -> None:
    """What the source folder holds beside the weights comes along in Python, however often a model is saved and loaded,
    and what is none of the model's stays where it is."""
    model = bittern.load(sentence_model(tmp_path / "source"))
    bittern.simulate(model, "ternary-2-2-8")
    bittern.save(bittern.pack(model), tmp_path / "packed")
    bittern.save(bittern.load(tmp_path / "packed"), tmp_path / "again")
    for folder in (tmp_path / "packed", tmp_path / "again"):
        names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        wanted = {"tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json", "README.md"}
        assert names >= wanted | {"config_sentence_transformers.json"}
        assert not names & {"notes.txt", "optimizer.bin"}
        for name in wanted - {"README.md"}:
            assert (folder / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_pipeline_of_a_folder(tmp_path: Path) -> None:
    """transformers' pipeline on a folder that `save` wrote gives what the model gives for the tokenizer's ids."""
    model = bittern.load(save_text_model(tmp_path / "source"))
    bittern.simulate(model, "ternary-2-2-8")
    bittern.save(bittern.pack(model), tmp_path / "packed")
    text = "a bittern"
    found = hf.pipeline("text-classification", str(tmp_path / "packed"), top_k=None)([text])[0]
    ids = hf.AutoTokenizer.from_pretrained(tmp_path / "source")(text, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**ids).logits.softmax(-1)[0]
    expected = {model.config.id2label[i]: p for i, p in enumerate(probabilities.tolist())}
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)


def test_missing_companions_are_named(tmp_path: Path) -> None:
    """A model whose source is not known, or has no processor, is saved with a warning that says so."""
    for name, what in (("bert", "tokenizer"), ("vit", "image processor")):
        with pytest.warns(UserWarning, match=f"has no {what}: the model was not loaded from a folder"):
            bittern.save(SUPPORTED[name]()[0], tmp_path / name)


def test_card(tmp_path: Path) -> None:
    """The card of a packed model says first to import bittern, and its recipe, size, source and licence; its Python
    runs. A float model gets none."""
    source = sentence_model(tmp_path / "source")
    model = bittern.load(source)
    bittern.save(model, tmp_path / "float")
    assert not (tmp_path / "float" / "README.md").exists()
    bittern.simulate(model, "ternary-2-2-8")
    bittern.save(bittern.pack(model), tmp_path / "packed", report={"float": {"accuracy": 0.5}})
    card = ModelCard.load(str(tmp_path / "packed" / "README.md"))
    assert (card.data.license, card.data.language, card.data.library_name) == ("apache-2.0", "en", "transformers")
    assert card.data.tags == ["bittern", "ternary-2-2-8"]
    code = card.text.split("```")[1]
    assert code.splitlines()[1].startswith("import bittern")
    for part in ("Recipe: ternary-2-2-8", "MB on disk", "Made from: source", "Licence: apache-2.0", "accuracy"):
        assert part in card.text
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        given: dict[str, object] = {}
        exec(code.removeprefix("python").replace("path/to/this/folder", "packed"), given)
    assert type(given["model"]) is type(model)
    assert str(tmp_path) not in card.text


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded is the whole folder, tokenizer and card with the figures included, under the name asked for."""
    model = bittern.load(sentence_model(tmp_path / "source"))
    bittern.simulate(model, "ternary-2-2-8")
    bittern.save(bittern.pack(model), tmp_path / "packed", report={"float": {"accuracy": 0.5}, "packed": {}})
    sent: list[dict[str, bytes]] = []

    def upload(api: HfApi, *, repo_id: str, folder_path: Path, **commit: str) -> str:
        assert (repo_id, commit) == ("me/small", {"revision": "v1"})
        sent.append({str(f.relative_to(folder_path)): f.read_bytes() for f in folder_path.rglob("*") if f.is_file()})
        return "https://hub/commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    loaded = [bittern.load(tmp_path / "packed") for _ in range(6)]  # often: no run may change a byte
    for pushed in (*loaded, model):  # the last was packed just now
        assert pushed.push_to_hub("me/small", revision="v1") == "https://hub/commit"
    *all_ready, fresh = sent
    ready = all_ready[0]
    assert ready["README.md"] == (tmp_path / "packed" / "README.md").read_bytes()
    assert {"bittern.json", "tokenizer.json", "modules.json", "model.safetensors"} <= ready.keys()
    assert {files["model.safetensors"] for files in all_ready} == {(tmp_path / "packed/model.safetensors").read_bytes()}
    assert b"import bittern" in fresh["README.md"]
    assert b"license: apache-2.0" in fresh["README.md"]


def test_size_of_the_source(tmp_path: Path) -> None:
    """The size of a float model is that of its files, in whatever type they hold it."""
    model, _ = SUPPORTED["bert"]()
    assert float_bytes(model) == 4 * model.num_parameters()
    model.half().save_pretrained(tmp_path / "half")
    loaded = bittern.load(tmp_path / "half")
    assert source_of(loaded) == str(tmp_path / "half")
    assert float_bytes(loaded) == (tmp_path / "half" / "model.safetensors").stat().st_size < 3 * model.num_parameters()
