"""Texts with something to tell of their tokens: tags of words, where an answer stands, which word is masked.

A row is what the tokenizer makes of a text, as lists of numbers, with `labels` (of each token, -100 for none) or
`start_positions` and `end_positions` (of the answer), as the model's loss takes them.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForTokenClassification

from bittern.data.texts import Collate

Tokenized = dict[str, Any]
TARGETS = ("labels", "start_positions", "end_positions")
LONGEST_ANSWER = 30  # tokens


def tag_rows(
    texts: Sequence[Any], tags: Sequence[Sequence[int]] | None, tokenizer: Any, limit: int, words: bool
) -> list[Tokenized]:
    """Tokenize texts, or lists of words. tags: class of each word, which its first token gets."""
    found = tokenizer(list(texts), is_split_into_words=words, truncation=True, max_length=limit)
    rows = _rows(found)
    for i, (row, own) in enumerate(zip(rows, tags or (), strict=tags is not None)):
        places = found.word_ids(i)
        pairs = zip([None, *places], places, strict=False)
        row["labels"] = [-100 if place in (None, before) else own[place] for before, place in pairs]
    return rows


def answer_rows(
    texts: Sequence[tuple[str, ...]], answers: Sequence[Any] | None, tokenizer: Any, limit: int
) -> list[Tokenized]:
    """Tokenize questions and their contexts. answers: of SQuAD, `text` and `answer_start`; none has the span (0, 0)."""
    columns = map(list, zip(*texts, strict=True))
    found = tokenizer(*columns, truncation=True, max_length=limit, return_offsets_mapping=True)
    spans = found.pop("offset_mapping")
    rows = _rows(found)
    for i, row in enumerate(rows):
        parts = found.sequence_ids(i)
        row["spans"] = [s if p == len(texts[i]) - 1 else None for s, p in zip(spans[i], parts, strict=True)]
        row["context"] = texts[i][-1]
        if answers is not None:
            row["answers"] = list(answers[i]["text"])
            start = end = 0
            if row["answers"]:
                first = answers[i]["answer_start"][0]
                last = first + len(row["answers"][0])
                inside = [t for t, s in enumerate(row["spans"]) if s and s[0] < last and s[1] > first]
                if inside and row["spans"][inside[-1]][1] >= last:  # else it was cut off
                    start, end = inside[0], inside[-1]
            row["start_positions"], row["end_positions"] = start, end
    return rows


def masked_rows(texts: Sequence[tuple[str, ...]], tokenizer: Any, limit: int, share: float = 0.15) -> list[Tokenized]:
    """Tokenize texts and mask a share of the tokens, at least one, always the same; texts without any are left out."""
    columns = map(list, zip(*texts, strict=True))
    found = tokenizer(*columns, truncation=True, max_length=limit, return_special_tokens_mask=True)
    special, generator = found.pop("special_tokens_mask"), torch.Generator().manual_seed(0)
    rows = _rows(found)
    for row, marks in zip(rows, special, strict=True):
        places = torch.tensor([i for i, mark in enumerate(marks) if not mark], dtype=torch.long)
        order = torch.randperm(len(places), generator=generator)[: max(1, round(share * len(places)))]
        row["labels"] = [-100] * len(marks)
        for i in places[order].tolist():
            row["labels"][i], row["input_ids"][i] = row["input_ids"][i], tokenizer.mask_token_id
    return [row for row in rows if set(row["labels"]) != {-100}]


def _rows(found: Any) -> list[Tokenized]:
    return [{name: list(values[i]) for name, values in found.items()} for i in range(len(found["input_ids"]))]


def token_collate(tokenizer: Any) -> Collate:
    """Return a function that makes batches of rows, padded at the right, with their labels."""
    tokenizer.padding_side = "right"
    names, pad = (*tokenizer.model_input_names, *TARGETS), DataCollatorForTokenClassification(tokenizer)
    return lambda rows: dict(pad([{name: row[name] for name in names if name in row} for row in rows]))


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return first word, end and type of the entities that tags such as B-PER, I-PER and O tell, as conlleval does: an
    entity also begins where the type changes."""
    found, start, kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, now = tag.partition("-")
        if kind and (now != kind or mark in "BSUO"):
            found.add((start, i, kind))
            kind = ""
        if now and not kind:
            start, kind = i, now
        if kind and mark in "ELSU":
            found.add((start, i + 1, kind))
            kind = ""
    return found


def tag_scores(rows: Sequence[Tokenized], logits: Tensor, names: Mapping[int, str]) -> dict[str, float]:
    """Return accuracy of words by logits (tokens, classes), and, of tags such as B-PER, F1 of whole entities over all
    texts (as seqeval's micro average)."""
    hits, total, same = 0, 0, []
    for row, part in zip(rows, logits.argmax(-1).split([len(row["labels"]) for row in rows]), strict=True):
        pairs = [(n, label) for n, label in zip(part.tolist(), row["labels"], strict=True) if label != -100]
        same += [n == label for n, label in pairs]
        chosen, right = (entities([names[n] for n in numbers]) for numbers in ([*zip(*pairs, strict=True)] or [(), ()]))
        hits, total = hits + len(chosen & right), total + len(chosen) + len(right)
    f1 = {"f1": 2 * hits / total if total else 1.0} if any(name.startswith("B-") for name in names.values()) else {}
    return f1 | {"accuracy": sum(same) / max(len(same), 1)}


def best_spans(rows: Sequence[Tokenized], logits: Tensor) -> list[tuple[int, int]]:
    """Return first and last token of the likeliest answer to each question, by logits of start and end (tokens, 2); (0,
    0) is none, if the data has such questions."""
    empty, found = any(not row.get("answers", True) for row in rows), []
    for row, part in zip(rows, logits.split([len(row["input_ids"]) for row in rows]), strict=True):
        inside = torch.tensor([span is not None for span in row["spans"]])
        both = part[:, 0, None] + part[None, :, 1]  # (first, last)
        allowed = torch.ones_like(both).triu().tril(LONGEST_ANSWER - 1).bool() & inside[:, None] & inside
        allowed[0, 0] |= empty or not inside.any()
        found.append(divmod(int(both.masked_fill(~allowed, -torch.inf).argmax()), len(both)))
    return found


def answer_scores(rows: Sequence[Tokenized], logits: Tensor) -> dict[str, float]:
    """Return F1 of words and the share of exact matches, each with the best of several right answers, as for SQuAD."""
    scores = []
    for row, (first, last) in zip(rows, best_spans(rows, logits), strict=True):
        begin, end = row["spans"][first], row["spans"][last]
        said = _words(row["context"][begin[0] : end[1]] if begin and end else "")
        rights = [_words(answer) for answer in row["answers"] or [""]]
        shared = [2 * sum((Counter(said) & Counter(right)).values()) for right in rights]
        alike = [n / (len(said) + len(r)) if said or r else 1.0 for n, r in zip(shared, rights, strict=True)]
        scores.append((max(alike), float(said in rights)))
    f1, exact = (sum(values) / len(rows) for values in zip(*scores, strict=True))
    return {"f1": f1, "exact_match": exact}


def _words(text: str) -> list[str]:
    """Return words in lower case, without punctuation and articles."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()
