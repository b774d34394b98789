"""What each command shows of the result of its job."""

import re
from collections import Counter
from typing import Any

from bittern.options import LAYER_TYPES
from bittern.progress import megabytes
from bittern.show import print_table, say, warn

Facts = dict[str, Any]


def wrote(out: str) -> None:
    """Say where the result lies, and what to do with it next."""
    say(f"Wrote {out}. Next: ", (f"bittern inspect {out}", "bold"))


def kept(modules: list[Facts]) -> str:
    """Name layers, if few; what has no weight matrix, such as norms, by type and count."""
    layers = [module["name"] for module in modules if module["type"] in LAYER_TYPES]
    others = Counter(m["type"] for m in modules if m["name"] not in layers)
    named = layers[:6] + ([f"{len(layers) - 6} more layers"] if len(layers) > 6 else [])
    return ", ".join(named + [f"{count} {kind}" for kind, count in others.items()]) or "nothing"


def of_blocks(name: str) -> str:
    """Return the name that the same part of all blocks shares."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


# ---- commands that make a smaller model


def compress(result: Facts) -> None:
    rows = [("", "float", f"{result['float']:.4f}", "", megabytes(result["float_bytes"]), "", "")]
    for row in result["rows"]:
        mark = "→" if row["rung"] == result["chosen"] else "" if row["within"] else "✗"
        points, size = f"{row['points']:.2f} ± {row['error']:.2f}", f"{megabytes(row['file'])} ({row['smaller']:.1f}×)"
        value, speed = f"{row[result['metric']]:.4f}", (f"{row['latency_ms']:.1f}", f"{row['faster']:.2f}×")
        rows.append((mark, row["rung"], value, points, size, *speed))
    say(f"{result['source']} on {result['rows'][0]['samples']:,} samples of {result['data']}, {result['origin']}")
    title = "→ chosen, ✗ may lose too much"
    print_table(("", "rung", result["metric"], "points lost", "size", "ms", "faster"), rows, title, left=("rung",))
    fresh = result["fresh"]
    loss = f"it loses {fresh['points']:.2f} points, at most {fresh['at_most']:.2f} with 95 %"
    say(f"{result['chosen']}: {result['why']}. On {fresh['samples']:,} other samples {loss}.")
    if fresh["at_least"] <= result["max_loss"] < fresh["at_most"]:
        say(f"That is too little data to be sure of {result['max_loss']:g} points; more labelled samples would tell.")
    say(f"Drawn in {result['out']}/compress.html. All rungs are in {result['rungs']}, for --keep.")
    wrote(result["out"])


def demo(result: Facts) -> None:
    from bittern.demo import DEMOS

    for name, rows in result.items():
        accuracies = [] if rows[0]["accuracy"] is None else ["accuracy"]
        cells = []
        for row in rows:
            sizes = f"{row['bits']:.2f}", f"{row['bytes'] / 1e3:,.0f}", f"{rows[0]['bytes'] / row['bytes']:.1f}"
            values = (f"{row[metric]:.4f}" for metric in (*accuracies, "agreement"))
            error = "" if row["max_error"] is None else f"{row['max_error']:g}"
            cells.append((row["format"], *sizes, *values, error))
        print_table(("format", "bits", "kB", "×", *accuracies, "agreement", "max error"), cells, DEMOS[name].title)
    say(
        "bits: per quantized weight, with scales · kB: whole file · agreement: with float · max error: "
        "simulated against packed, loaded in a fresh process, without kernels"
    )
    own = "bittern quantize MODEL --recipe w8a8 --data DATA -o OUT"
    say("Next: ", (f"bittern inspect {rows[1]['path']}", "bold"), "    your own model: ", (own, "bold"))


def sizes_and_metrics(result: Facts, how: str = "") -> None:
    """Print the float model against the packed one."""
    bits = "16" if result["float_bytes"] < 0.75 * result["float32"] else "32"
    rows = [
        ("size", megabytes(result["float_bytes"]), megabytes(result["file"])),
        ("bits per quantized weight", bits, f"{result['bits']:.2f}"),
    ]
    if "packed" in result:
        for name, value in result["packed"].items():
            rows.append((name.replace("_", " "), f"{result['float'][name]:.4f}", f"{value:.4f}"))
        rows.append(("kernels", "", result["kernels"]))
        rows.append(("max error simulated–packed, without kernels", "", f"{result['max_error_simulated_packed']:g}"))
    print_table(("", "float", "packed"), rows, f"{result['source']} by {result['recipe']}{how}")
    if "origin" in result:
        say(f"Measured on {result['samples']:,} samples of {result['data']}, {result['origin']}.")
    if judged := result.get("verdict"):
        say((judged["text"], "" if judged["level"] == "kept" else "bold yellow"))


def modules(result: Facts) -> None:
    """Say what was quantized and what was not."""
    say(f"{result['quantized']} modules quantized; kept float: {kept(result['kept_float'])}")
    say("; ".join(result["notes"]))


def quantize(result: Facts) -> None:
    sizes_and_metrics(result)
    modules(result)
    if "packed" not in result:
        why = "the data has no test or validation split" if result["data"] else "no data was given; add --data"
        say(f"No accuracy was measured: {why}.")
    wrote(result["out"])


def ptq(result: Facts) -> None:
    found = result["ptq"]
    say(result["what"])
    losses(found["solved"])
    if found["bits"]:
        say("bits: " + " ".join(f"{part} {width}" for part, width in found["bits"].items()))
        errors = ", ".join(f"{name} {error:.3g}" for name, error in found["divergence"].items())
        say(f"error of the outputs, of which the least was taken: {errors}")
    if found["by_extremes"]:
        say(f"by extremes: {', '.join(found['by_extremes'])}")
    sizes_and_metrics(result, f", method {found['method']}, {found['samples']} samples")
    memory = f"; peak memory {megabytes(found['peak_memory'])}" if found["peak_memory"] else ""
    say(", ".join(f"{phase} {value:.1f} s" for phase, value in found["seconds"].items()) + memory)
    wrote(result["out"])


def losses(solved: list[Facts]) -> None:
    """Print 1 - similarity of outputs before and after, the same part of all blocks in one row."""
    groups: dict[str, list[Facts]] = {}
    for entry in solved:
        groups.setdefault(of_blocks(entry["name"]), []).append(entry)
    rows = []
    for name, entries in groups.items():
        before, after = (sum(e[k] for e in entries) / len(entries) for k in ("before", "after"))
        worst, rounds = (max(e[k] for e in entries) for k in ("after", "rounds"))
        rows.append((name, str(len(entries)), f"{before:.2e}", f"{after:.2e}", f"{worst:.2e}", str(rounds)))
    title = "output error: with scales of the extremes, and as found (mean; worst)"
    print_table(("layer or product", "count", "before", "after", "worst", "rounds"), rows, title)


def qat(result: Facts) -> None:
    run = result["qat"]
    kept_step = f"step {run['best_step']}" if run["best_step"] else "the last step"
    best, memory = f"{run['metric']} {run['best']:.4f}", f"peak memory {megabytes(result['peak_memory'])}"
    say(f"{run['steps']} steps in {run['seconds'] / 60:.1f} minutes; {kept_step} is kept: {best}; {memory}")
    if run["phases"]:
        say(intervened(run["phases"], result.get("plain")))
    sizes_and_metrics(result, f", learned from {', '.join(result['distill']['terms'])}")
    modules(result)
    wrote(result["out"])


def intervened(phases: list[Facts], baseline: Facts | None) -> str:
    """Tell what the teacher did when, and how many steps that saved against a run without it, if one is known."""
    *acts, alone = phases
    spans = ", ".join(f"{act['name']} in steps {act['from'] + 1} to {act['to']}" for act in acts)
    text = f"the teacher intervened: {spans}; the student was alone from step {alone['from'] + 1}"
    if baseline is None:
        return f"{text}; --plain OUT of a run without intervention tells how many steps that saved"
    best = f"{baseline['metric']}, {baseline['best']:.4f}"
    text += f". {baseline['folder']} reached its best {best}, at step {baseline['best_step']} of {baseline['steps']}; "
    if baseline["reached"] is None:
        return f"{text}this run did not"
    saved = baseline["best_step"] / baseline["reached"]
    return f"{text}this run was there at step {baseline['reached']}: {saved:.1f} times fewer steps"


# ---- commands that look


def evaluate(result: Facts) -> None:
    for name, value in result.items():
        shown = megabytes(value) if name in ("file", "float32") else value
        say(f"{name.replace('_', ' '):16} " + (f"{shown:.4f}" if isinstance(shown, float) else str(shown)))


def inspect(result: Facts) -> None:
    recipe = f" by {result['recipe']}" if result["recipe"] else ""
    size = f"{megabytes(result['file'])} on disk ({megabytes(result['float32'])} in float32)"
    held = f"{result['bits']:.2f} bits per quantized weight, {result['tensors']} tensors"
    say(f"{result['architecture']}, {result['state']}{recipe}: {size}, {held}")
    if result["state"] == "packed":
        kernels = result["kernels"] or "none: weights are unpacked in each forward, which is slow"
        say(f"integer kernels on this machine: {kernels}")
    if "verified" in result:
        say(f"outputs are those of the model that was saved, up to {result['verified']:.1e}")
    groups = Counter(
        (of_blocks(m["name"]), "\n".join(f"{point}: {form}" for point, form in m.items() if point != "name"))
        for m in result["modules"]
    )
    if groups:
        rows = [(name, str(count), formats) for (name, formats), count in groups.items()]
        print_table(("modules", "count", "formats"), rows, left=("modules", "formats"), show_lines=True)
    total = sum(module["parameters"] for module in result["kept_float"])
    say(f"kept float: {kept(result['kept_float'])}; {total:,} parameters in all")


def analyze(result: Facts) -> None:
    for model in result["students"]:
        if model["verdict"]:
            say(f"{model['name']}: {model['verdict']['text']}")
        say(f"What stands out in {model['name']}:")
        for i, block in enumerate(model["worst"], 1):
            say(f"{i}. {block['name']}: {block['found']} What to try: {block['advice']}")
    out = result["out"]
    say(f"Wrote {out}. Next: open ", (f"{out}/report.html", "bold"), " in a browser")


# ---- commands for models in use

FORMS = {
    "static": "multiplied as bytes, static ranges of inputs",
    "dynamic": "multiplied as bytes, ranges of inputs found at run time",
    "nbits": "MatMulNBits, codes packed",
    "portable": "DequantizeLinear and MatMul, codes packed",
    "rows": "embeddings, rows unpacked as they are read",
    "stored": "integer weights, computed in float",
    "float": "float",
}


def export(result: Facts) -> None:
    if "layers" not in result:
        return say(f"Wrote {result['out']} by {result['to']}, {megabytes(result['bytes'])}")
    for kind, count in result["layers"].items():
        say(f"{count:4} layers: {FORMS[kind]}")
    nodes = ", ".join(f"{count} {kind}" for kind, count in result["float_nodes"].items())
    say(f"in float: {kept(result['kept_float'])}; of all operators {nodes}")
    if result["may_saturate"]:
        may = f"{len(result['may_saturate'])} layers have 8-bit weights that may saturate on x86 without VNNI"
        say(f"{may}: there set session.x64quantprecision=1, or export with --safe")
    parity = result["parity"]
    same = "" if parity["agreement"] is None else f"agreement {parity['agreement']:.4f}, "
    error = f"relative error {parity['error']:.2e}, largest {parity['largest']:.2e}"
    say(f"against the simulated model on {parity['samples']} samples ({result['data']}): {same}{error}")
    twin = f"{parity['twin']:.2e} (limit {parity['limit']:.2e}; {parity['drift']:.2e} apart)"
    others = f"its arithmetic in PyTorch {twin}, the simulated model {parity['simulated']:.2e}"
    say(f"against the exact model: the file {parity['file']:.2e}, {others}")
    say(f"Wrote {result['out']}, {megabytes(result['bytes'])}")


def bench(result: Facts) -> None:
    rows = []
    for name, engine in result["engines"].items():
        times = f"{engine['latency_ms']:.2f}", f"{engine['samples_per_second']:.1f}", f"{engine['times_ours']:.2f}"
        sizes = ("" if engine[size] is None else megabytes(engine[size]) for size in ("weights_in_memory", "file"))
        rows.append((name, *times, *sizes))
    inputs = ", ".join(f"{name} {' × '.join(map(str, shape))}" for name, shape in result["inputs"].items())
    title = f"{inputs}; {result['threads']} threads, kernels: {result['kernels'] or 'none'}"
    print_table(("engine", "ms", "samples/s", "time / ours", "weights in memory", "file"), rows, title)
    say(f"medians of runs in turn; kernels and simulated model differ by {result['difference_kernels_simulated']:.1e}")
    if not result["kernels"]:
        warn(f"no kernels here: {result['why_none']}; packed layers unpack their weights, which is slow")
    for formats, count in Counter(result["without_kernel"].values()).items():
        warn(f"no fast path for {formats} ({count} modules): they compute in float")
