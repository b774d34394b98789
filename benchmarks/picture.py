"""Draw the picture of the README: other engines' times beside ours, one row for each model, from what was measured.

python benchmarks/picture.py benchmarks/results/inference.json docs/figures/engines.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ENGINES = {
    "vs_ctranslate2": "CTranslate2 int8",
    "vs_int8": "onnxruntime int8",
    "vs_fp32": "onnxruntime",
    "vs_torch": "PyTorch",
}
COLOURS = dict(
    zip(["Bittern", *ENGINES.values()], ("#0f766e", "#c2410c", "#7c3aed", "#2563eb", "#57534e"), strict=True)
)
WIDTH, LEFT, TOP, ROW, MOST = 720, 104, 58, 40, 7.0


def at(times: float) -> float:
    return LEFT + (WIDTH - LEFT - 24) * times / MOST


def dot(x: float, y: float, name: str, tip: str = "") -> str:
    return f'<circle cx="{x:.1f}" cy="{y}" r="7" fill="{COLOURS[name]}"><title>{tip}</title></circle>'


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="#1c1917">{words}</text>'


def draw(rows: list[dict[str, Any]]) -> str:
    """One sample on one thread: a dot for each engine at its time / ours."""
    chosen = [row for row in rows if row["batch"] == 1 and row["threads"] == 1 and not row["busy"]]
    bottom = TOP + ROW * len(chosen)
    size = f'viewBox="0 0 {WIDTH} {bottom + 44}" font-family="sans-serif" font-size="13"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', '<rect width="100%" height="100%" fill="#ffffff"/>']
    for i, name in enumerate(COLOURS):
        parts += [dot(16 + 140 * i, 20, name), text(28 + 140 * i, 25, name, "start")]
    for mark in range(1, int(MOST) + 1):
        x = f"{at(mark):.1f}"
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP - 14}" y2="{bottom - 8}" stroke="#d6d3d1"/>')
        parts.append(text(at(mark), bottom + 10, f"{mark} ×"))
    for i, row in enumerate(chosen):
        y, times = TOP + ROW * i + 8, {"Bittern": 1.0}
        times |= {name: float(row[key]) for key, name in ENGINES.items() if row.get(key)}
        parts.append(text(LEFT - 4, y + 5, row["model"], "end"))
        parts.append(f'<line x1="{at(1):.1f}" x2="{at(max(times.values())):.1f}" y1="{y}" y2="{y}" stroke="#a8a29e"/>')
        for name, factor in reversed(times.items()):
            parts.append(dot(at(factor), y, name, f"{row['model']}: {name} {factor:.2f} × our time"))
    parts.append(text((LEFT + WIDTH) / 2, bottom + 32, "time of one sample / ours; one thread"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_text(draw(json.loads(options.results.read_text())["models"]))


if __name__ == "__main__":
    main()
