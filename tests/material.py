"""What the tests of whole jobs share: commands in this process, a text model and a tokenizer, tables, listings."""

from __future__ import annotations

import io
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bittern import cli
from families import SUPPORTED

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SENTENCE = "a bittern booms at dawn in the reeds of still water and hides by day"
WORDS = [*SPECIAL.values(), *SENTENCE.split()]
TEXTS = [" ".join(WORDS[4 + (i * k) % 14] for k in range(1, 4 + i % 5)) for i in range(40)]
LABELS = [i % 3 for i in range(40)]


class Ran(NamedTuple):
    """What a command did: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


def command(line: str) -> Ran:
    """`bittern ...` as typed, but in this process: a fresh one spends most of its time on imports."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "bittern"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", [program, *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def succeed(line: str) -> str:
    """A command that must exit with 0 and say nothing on stderr; what it printed."""
    ran = command(line)
    assert (ran.code, ran.err) == (0, ""), line
    return ran.out


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, hidden files too, with time and size."""
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def save_text_model(folder: Path, head: bool = True) -> Path:
    """A small BERT, with three classes or without a head, and a tokenizer of single words."""
    model, _ = SUPPORTED["bert"]()
    (model if head else model.base_model).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    return folder


def write_tables(folder: Path, **columns: Any) -> Path:
    """train.parquet and validation.parquet with the same columns."""
    import datasets

    datasets.disable_progress_bars()
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return folder
