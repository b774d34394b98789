"""Build hook: compiles the kernels of src/bittern/native into the package, for wheels and editable installs.

One library for each kind of CPU that the compiler's target has: x86-64 or arm64, with Linux or macOS. Without a C++
compiler, or for another target, the build goes on without them, as a pure wheel: packed models then take a slower path,
and say so.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "src/bittern/native"
SLOWER = "no kernels were compiled, and packed models will take the slower path"
# GCC 12 takes undefined registers in its own AVX-512 header for mistakes; Clang says which loops it leaves as they are.
FLAGS = (
    "-std=c++17 -O3 -Wall -Wextra -Wno-unknown-warning-option -Wno-maybe-uninitialized -Wno-pass-failed "
    "-fopenmp-simd -fno-math-errno -fno-trapping-math -pthread"
)
AVX512 = "-march=x86-64-v4 -mavx512vnni -mprefer-vector-width=512"
X86 = {"avx2": "-march=x86-64-v3", "avx512": AVX512, "amx": f"{AVX512} -mamx-tile -mamx-int8"}
DOTPROD = "-march=armv8.2-a+dotprod"
ARM = {"neon": "-march=armv8-a", "dotprod": DOTPROD, "i8mm": f"{DOTPROD}+i8mm"}
KINDS = X86 | ARM


class Target(NamedTuple):
    """What a compiler compiles for. tag: of a wheel; kinds: none for a target without kernels."""

    tag: str
    suffix: str
    flags: str
    kinds: dict[str, str]


def target_of(compiler: list[str]) -> Target:
    """Ask the compiler. Raises OSError or CalledProcessError if there is none."""
    command = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    macros = {line.split()[1] for line in said.splitlines()}
    arm, x86, macos = "__aarch64__" in macros, "__x86_64__" in macros, "__APPLE__" in macros
    kinds = ARM if arm else X86 if x86 else {}
    if macos:
        tag, flags = f"macosx_11_0_{'arm64' if arm else 'x86_64'}", "-mmacosx-version-min=11.0"  # the first for arm64
        return Target(tag, ".dylib", flags, {kind: kinds[kind] for kind in kinds if arm or kind == "avx2"})
    return Target(f"linux_{'aarch64' if arm else 'x86_64'}", ".so", "", kinds if "__linux__" in macros else {})


def compile_kernels(folder: Path) -> tuple[list[Path], str]:
    """Compile what the compiler can: the libraries, and their wheel's tag. Says on stderr what was left out and why."""
    compiler, made = shlex.split(os.environ.get("CXX", "c++")), []
    try:
        target = target_of(compiler)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"bittern: {SLOWER}: no C++ compiler: {error}", file=sys.stderr)
        return [], ""
    if not target.kinds:
        print(f"bittern: {SLOWER}: there are none for this platform", file=sys.stderr)
    for kind, flags in target.kinds.items():
        library = folder / f"libbittern-{kind}{target.suffix}"
        part = library.with_suffix(f".{os.getpid()}{target.suffix}")
        flags = f"{FLAGS} {flags} {target.flags} -shared -fPIC"
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
    return made, target.tag


class KernelHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        made, tag = compile_kernels(Path(self.root) / NATIVE)
        build_data["artifacts"] += [str(library.relative_to(self.root)) for library in made]
        if made:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{tag}"
