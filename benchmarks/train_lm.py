"""A small language model of characters, trained on Python's own documentation (the texts that `help()` shows).

    python benchmarks/train_lm.py --out runs/gpt2-characters

Writes the model with its tokenizer, and its texts as train.txt and validation.txt in OUT/data: every tenth topic is
held out. GPT-2 with 4 layers of 128, 0.8 million weights, blocks of 64 characters.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from training import publish
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from bittern.data import load_splits
from bittern.data.evaluate import metrics, predict


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """A token for each character."""
    vocabulary = {c: i for i, c in enumerate(["<unk>", "<end>", *sorted(set(text))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<end>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    texts = list(pydoc_data.topics.topics.values())
    folder = options.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("validation", texts[::10]), ("train", [t for i, t in enumerate(texts) if i % 10])):
        (folder / f"{name}.txt").write_text("\n".join(part))
    tokenizer = tokenizer_of("\n".join(texts))
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=128, n_layer=4, n_head=4, **ids)
    model = GPT2LMHeadModel(config)
    publish(model, tokenizer, options.out)
    train, test = load_splits(str(folder), model, options.out, max_length=64)
    assert train is not None
    assert test is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    start, draw = time.time(), torch.Generator().manual_seed(0)
    for step in range(1, options.steps + 1):
        chosen = torch.randint(len(train), (options.batch_size,), generator=draw).tolist()
        batch = train.collate([train.rows[i] for i in chosen])
        model.train()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0 or step == options.steps:
            perplexity = metrics(model, test, predict(model, test))["perplexity"]
            print(f"step {step}, {time.time() - start:.0f} s: loss {loss:.3f}, perplexity {perplexity:.3f}", flush=True)
            publish(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
