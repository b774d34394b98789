"""How true is "any Transformer"? Every model type of transformers through Bittern, into docs/compatibility.md.

    python tests/census                   # all types, about an hour of a core; types that are in --out already are kept
    python tests/census --popular --fast  # the most used ones, all steps but the search of `ptq`: a few minutes
    python tests/census bert mpnet        # only these, printed and not written into the docs
    python tests/census --head MASKED_LM  # types with this head: MASKED_LM, TOKEN_CLASSIFICATION, QUESTION_ANSWERING, …

Each type runs in a process of its own, within limits of time and memory. Results go to a file of JSON lines, in which
the last line of a type counts.
"""

import argparse
import json
import os
import resource
import select
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from needs import POPULAR
from steps import examine
from tiny import all_types, names

import bittern

DOCS = Path(__file__).parents[2] / "docs" / "compatibility.md"
PAGE = """# Compatibility

What Bittern {bittern} makes of {which} of transformers {transformers}: a tiny model with random weights is
simulated, calibrated, packed, saved, loaded{search} and trained for a step, and each step's outputs are compared
(`make census`). `w8a8` is the recipe; head and positions stay float by it, so that the share of quantized weights is
that of a tiny model: real ones have more in their blocks. {judged} types can be judged:
{counts}.

* **served**: every step is right. Attention: the number of attention modules whose products are quantized.
* **refused**: a step ends with one clear line, before anything is changed.
* **crash**: a step fails otherwise, or its answer is wrong: a bug.

What stays float, and why:

* `nn.MultiheadAttention` (WavLM, the pooling head of SigLIP, BridgeTower, Aria): PyTorch's one function for it reads
  the weights and multiplies inside.
* XLNet: its projections are parameters of an einsum and no layers.
* Attention by blocks, random and global tokens (Longformer, BigBird, LongT5 and Pegasus-X for local ones): products of
  pieces. LiLT, which computes two attentions in one module.
* Deformable sampling, state spaces and linear attention (Deformable DETR, Mamba, xLSTM, Qwen3-Next): no softmax of a
  product is there.
* Attention that is another than its family's own eager function (Nemotron's streaming encoder): the model keeps it.

Of the {popular} most used types {popular_judged} can be judged and {popular_served} are served. With heads for masked
language models, token classification and question answering (`--head`) they take the same steps.

Not judged: {unbuilt}, since no tiny model or no batch of theirs could be made here: libraries that are not installed
(timm, natten, detectron2, torchaudio), sessions of video, codecs whose sizes no number divides.

| type | class | outcome | weights quantized | attention | what stays float, or why |
|---|---|---|---|---|---|
{rows}
"""


def guarded(kind: str, seconds: float, gigabytes: float, search: bool, head: str | None) -> dict[str, Any]:
    """Examine a type in a process of its own, and judge it."""
    result: dict[str, Any] = {"type": kind, "steps": {}}
    read, write = os.pipe()
    start = time.time()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.close(read)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (int(used + gigabytes * 2**30),) * 2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            examine(kind, lambda what: os.write(write, (json.dumps(what) + "\n").encode()) and None, search, head)
        finally:
            os._exit(0)
    os.close(write)
    text, ended = b"", True
    while select.select([read], [], [], max(0.0, seconds - (time.time() - start)))[0]:
        if not (chunk := os.read(read, 1 << 16)):
            break
        text += chunk
    else:
        ended = False
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(read)
    for what in map(json.loads, text.decode().splitlines()):
        if "step" in what:
            result["steps"][what["step"]] = what
        elif "remark" in what:
            result.setdefault("remarks", {})[what["remark"].partition(":")[0]] = what["remark"]
        else:
            result |= what
    if not ended or os.WIFSIGNALED(status):
        text_of = f"no end after {seconds:g} s" if not ended else f"ended by signal {os.WTERMSIG(status)}"
        result["steps"][result["began"]] = {"outcome": "crash", "text": text_of}
    return result | {"outcome": judge(result["steps"]), "seconds": round(time.time() - start, 1)}


def judge(steps: dict[str, Any]) -> str:
    outcomes = {name: step["outcome"] for name, step in steps.items()}
    if outcomes.get("build") != "ok" or outcomes.get("float") != "ok":
        return "unbuilt"
    return next((outcome for outcome in ("crash", "refused") if outcome in outcomes.values()), "served")


def reason(result: dict[str, Any]) -> str:
    bad = [f"{name}: {step['text']}" for name, step in result["steps"].items() if step["outcome"] != "ok"]
    return (
        "; ".join([*bad, *result.get("notes", ()), *result.get("remarks", {}).values()])
        .replace("|", "\\|")
        .replace("\n", " ")
    )


def page(results: list[dict[str, Any]], which: str, search: bool) -> str:
    """The table of all types that can be judged. which: types these are; search: whether `ptq` was tried."""
    judged = [r for r in results if r["outcome"] != "unbuilt"]
    counts = [(outcome, sum(r["outcome"] == outcome for r in judged)) for outcome in ("served", "refused", "crash")]
    rows = [
        f"| {r['type']} | {r['class']} | {r['outcome']} | {f'{share:.0%}' if (share := r.get('share')) else ''} | "
        f"{r.get('attentions', '')} | {reason(r)} |"
        for r in sorted(judged, key=lambda r: r["type"])
    ]
    popular = [r["outcome"] for r in results if r["type"] in POPULAR]
    return PAGE.format(
        popular=len(popular),
        popular_judged=len(popular) - popular.count("unbuilt"),
        popular_served=popular.count("served"),
        which=which,
        search=", searched by `ptq`" if search else "",
        bittern=bittern.__version__,
        transformers=transformers.__version__,
        judged=len(judged),
        unbuilt=len(results) - len(judged),
        counts=", ".join(f"{count} {outcome} ({count / max(len(judged), 1):.0%})" for outcome, count in counts),
        rows="\n".join(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--popular", action="store_true", help="the most used types only")
    parser.add_argument("--fast", action="store_true", help="without the search of ptq")
    parser.add_argument("--head", help="with this head, such as MASKED_LM; printed and not written into the docs")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "bittern-census.jsonl")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--gigabytes", type=float, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    kept: dict[str, Any] = {}
    if options.out.exists() and not options.types and not options.head:
        kept = {r["type"]: r for r in map(json.loads, options.out.read_text().splitlines())}
    kinds = options.types or (POPULAR if options.popular else all_types())
    if options.head:
        kinds = [kind for kind in kinds if kind in names(options.head)]
    with options.out.open("a") as file:
        for kind in [k for k in kinds if k not in kept]:
            result = kept[kind] = guarded(kind, options.seconds, options.gigabytes, not options.fast, options.head)
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{result['outcome']:8} {kind:32} {result['seconds']:5.1f} s  {reason(result)[:150]}", flush=True)
    if not options.types and not options.head:
        which = f"the {len(POPULAR)} most used model types" if options.popular else "each model type"
        DOCS.write_text(page([kept[kind] for kind in kinds], which, not options.fast))
        print(f"wrote {DOCS}")


if __name__ == "__main__":
    main()
