"""Tokens a second of a small GPT-2 that generates with a cache: packed models, PyTorch and onnxruntime, in turn.

    python benchmarks/generation.py --json benchmarks/results/generation.json

A GPT-2 with random weights, on which times do not depend, goes on greedily from a prompt, one token at a time. Ours and
PyTorch's run by `model.generate`, with a cache that grows (dynamic) and with one of fixed size (static), and in a plain
loop, as onnxruntime's graph of one step does, which takes and gives the cache: in float32, and quantized dynamically to
int8 by its own tool. Its loop starts behind the prompt, which the others read first, in one pass; that speaks for
it. Figures are medians over alternating rounds of one process; with several threads each comes after a pause, in which
onnxruntime's threads fall asleep.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from inference import in_turn
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from bittern import calibrate, native, pack, simulate

RECIPES = {"bittern ternary": "ternary", "bittern w4a8": "w4a8", "bittern w8a8": "w8a8"}


class Step(nn.Module):
    """One step of a decoder: token (1, 1) and cache (layers, 2, 1, heads, n, dim) to logits (1, words) and cache."""

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, position: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        cache = DynamicCache(tuple((keys, values) for keys, values in past))
        mask = torch.zeros(1, 1, 1, past.shape[4] + 1)
        out = self.model(token, position_ids=position, past_key_values=cache, attention_mask=mask, use_cache=True)
        layers = out.past_key_values.layers
        return out.logits[:, -1], torch.stack([torch.stack([layer.keys, layer.values]) for layer in layers])


def onnxruntime_loops(
    model: GPT2LMHeadModel, prompt: Tensor, new: int, folder: Path
) -> dict[str, Callable[[], object]]:
    """The same continuation in onnxruntime, in float32 and in int8."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        start = model(prompt, use_cache=True)
        past = torch.stack([torch.stack([layer.keys, layer.values]) for layer in start.past_key_values.layers])
        token = start.logits[:, -1].argmax(-1, keepdim=True)
        given = token, torch.tensor([[prompt.shape[1]]]), past
        names = {"input_names": ["token", "position", "past"], "output_names": ["logits", "present"]}
        file, small = folder / "float32.onnx", folder / "int8.onnx"
        axes = {"past": {4: "n"}, "present": {4: "m"}}
        with warnings.catch_warnings(action="ignore"):  # of what a trace holds fast, which is the same in each step
            torch.onnx.export(Step(model).eval(), given, str(file), **names, dynamic_axes=axes, dynamo=False)
    quantize_dynamic(onnx.load(file), small, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    first = token.numpy(), past.numpy()

    def loop(session: Any) -> list[int]:
        (token, past), found = first, []
        for i in range(new):
            found.append(int(token[0, 0]))
            position = np.array([[prompt.shape[1] + i]])
            logits, past = session.run(None, {"token": token, "position": position, "past": past})
            token = logits.argmax(-1, keepdims=True)
        return found

    sessions = {f"onnxruntime {f.stem}": onnxruntime.InferenceSession(f, options) for f in (file, small)}
    expected = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)[0, prompt.shape[1] :]
    assert loop(sessions["onnxruntime float32"]) == expected.tolist()
    return {name: partial(loop, session) for name, session in sessions.items()}


def plain_loop(model: GPT2LMHeadModel, prompt: Tensor, new: int) -> list[int]:
    """Generate without what `model.generate` does around each step."""
    out, found = model(prompt, use_cache=True), list[int]()
    for _ in range(new):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(token))
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return found


def packed(model: GPT2LMHeadModel, recipe: str, prompt: Tensor) -> GPT2LMHeadModel:
    small = copy.deepcopy(model)
    simulate(small, recipe)
    calibrate(small, [{"input_ids": prompt}])
    pack(small)
    return small.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    heads = options.hidden // 64
    model = GPT2LMHeadModel(GPT2Config(n_embd=options.hidden, n_layer=options.layers, n_head=heads)).eval()
    prompt = torch.randint(0, model.config.vocab_size, (1, options.prompt))
    models = {"pytorch float32": model} | {name: packed(model, recipe, prompt) for name, recipe in RECIPES.items()}
    length = {"max_new_tokens": options.new, "min_new_tokens": options.new, "do_sample": False, "pad_token_id": 0}
    calls: dict[str, Callable[[], object]] = {}
    for name, one in models.items():
        calls[f"{name}, dynamic cache"] = partial(one.generate, prompt, **length)
        calls[f"{name}, plain loop"] = partial(plain_loop, one, prompt, options.new)
        calls[f"{name}, static cache"] = partial(
            one.generate, prompt, **length, cache_implementation="static", disable_compile=True
        )
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        calls |= onnxruntime_loops(model, prompt, options.new, Path(folder))
        times = in_turn(calls, options.rounds)
    speeds = {name: round(options.new / statistics.median(seconds), 1) for name, seconds in times.items()}
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    found = settings | {"kernels": native.engine()[0], "tokens_per_second": speeds}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print("| engine | tokens/s |\n|---|---|")
    for name, speed in sorted(speeds.items(), key=lambda pair: -pair[1]):
        print(f"| {name} | {speed:.1f} |")


if __name__ == "__main__":
    main()
