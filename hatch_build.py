"""Build hook: compiles the kernels of src/bittern/native into the package, for wheels and editable installs.

One library for each kind of CPU. Without a C++ compiler, or elsewhere than on x86-64 Linux, the build goes on without
them, as a pure wheel: packed models then take a slower path, and say so.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "src/bittern/native"
# GCC 12 takes undefined registers in its own AVX-512 header for mistakes.
FLAGS = (
    "-std=c++17 -O3 -Wall -Wextra -Wno-maybe-uninitialized -fopenmp-simd -fno-math-errno -fno-trapping-math -pthread"
)
AVX512 = "-march=x86-64-v4 -mavx512vnni -mprefer-vector-width=512"
KINDS = {"avx2": "-march=x86-64-v3", "avx512": AVX512, "amx": f"{AVX512} -mamx-tile -mamx-int8"}


def compile_kernels(folder: Path) -> list[Path]:
    """Compile what the system's compiler can; says on stderr what was left out and why."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        print("bittern: no kernels for this platform; packed models will take the slower path", file=sys.stderr)
        return []
    compiler, made = shlex.split(os.environ.get("CXX", "c++")), []
    for kind, flags in KINDS.items():
        library = folder / f"libbittern-{kind}.so"
        part = library.with_suffix(f".{os.getpid()}.so")
        flags = f"{FLAGS} {flags} -shared -fPIC"
        command = [*compiler, *flags.split(), str(folder / "kernels.cpp"), "-o", str(part)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
            print(f"bittern: kernels for {kind} were not compiled: {why}", file=sys.stderr)
            library.unlink(missing_ok=True)
            continue
        part.rename(library)  # whoever runs the old one keeps it
        made.append(library)
    return made


class KernelHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        made = compile_kernels(Path(self.root) / NATIVE)
        build_data["artifacts"] += [str(library.relative_to(self.root)) for library in made]
        if made:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
