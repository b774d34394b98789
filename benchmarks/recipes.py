"""Every ready-made recipe on one model and data set: file size, accuracy and agreement with float, as a table and JSON.

    python benchmarks/recipes.py MODEL DATA --json benchmarks/results/NAME.json

Scales come from the extremes of 128 calibration samples; nothing is searched or trained. Spread is over three draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from bittern.jobs import quantize
from bittern.recipe import recipe_names

SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for recipe in recipe_names():
        with tempfile.TemporaryDirectory() as folder:
            runs = [
                quantize(options.model, recipe, Path(folder) / str(seed), data=options.data, seed=seed)
                for seed in SEEDS
            ]
        metric = next(m for m in ("accuracy", "similarity") if m in runs[0]["packed"])
        values = [run["packed"][metric] for run in runs]
        rows.append(
            {
                "recipe": recipe,
                "bits": round(runs[0]["bits"], 2),
                "file": runs[0]["file"],
                "smaller": round(runs[0]["float_bytes"] / runs[0]["file"], 2),
                metric: round(statistics.mean(values), 4),
                "spread": round(max(values) - min(values), 4),
                "float": round(runs[0]["float"][metric], 4),
                "max_error": max(run["max_error_simulated_packed"] for run in runs),
            }
        )
        print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"samples": 128, "seeds": SEEDS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
