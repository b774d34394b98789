from pathlib import Path
from typing import Any

REPORT = "report.json"


def write_report(result: dict[str, Any], folder: Path) -> None:
    import json

    (folder / REPORT).write_text(json.dumps(result))
