"""The kernels against files that stand for the simulated model; `make arm` runs the same files on emulated arm64."""

import subprocess
import sys
from pathlib import Path

import hatch_build
import pytest

from bittern import native

HERE = Path(__file__).parent
pytestmark = pytest.mark.kernels


def test_cases(tmp_path: Path) -> None:
    """Codes, packed weights, also of folders that users have, and integer products are the simulated model's on every
    kind of CPU, floats lie within their rounding."""
    run = subprocess.run(
        [sys.executable, HERE / "native/cases.py", tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split()[0]) > 300
    kinds, include = native.kinds(), HERE.parent / hatch_build.NATIVE
    made = []
    for kind in kinds:
        flags = f"{hatch_build.FLAGS} {hatch_build.KINDS[kind]} -O1 -Werror -I {include}".split()
        made.append(subprocess.Popen(["c++", *flags, HERE / "native/conformance.cpp", "-o", tmp_path / kind]))
    assert [build.wait() for build in made] == [0] * len(kinds)
    for kind in kinds:
        for threads in ("1", "3"):
            said = subprocess.run(
                [tmp_path / kind, tmp_path / "cases", threads], capture_output=True, text=True, check=False
            )
            assert (said.returncode, said.stdout) == (0, run.stdout), (kind, said.stderr)
