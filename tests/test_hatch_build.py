"""The build hook compiles for what the compiler says is its target, whatever machine it runs on."""

from pathlib import Path

import hatch_build
import pytest

ARM, X86 = ["neon", "dotprod", "i8mm"], ["avx2", "avx512", "amx"]


@pytest.mark.parametrize(
    ("macros", "tag", "suffix", "kinds"),
    [
        ("__linux__ __x86_64__", "linux_x86_64", ".so", X86),
        ("__linux__ __aarch64__", "linux_aarch64", ".so", ARM),
        ("__APPLE__ __aarch64__", "macosx_11_0_arm64", ".dylib", ARM),
        ("__APPLE__ __x86_64__", "macosx_11_0_x86_64", ".dylib", ["avx2"]),
        ("__linux__ __riscv", "", "", []),
        ("_WIN32 __x86_64__", "", "", []),
    ],
)
def test_target(tmp_path: Path, macros: str, tag: str, suffix: str, kinds: list[str]) -> None:
    """Each platform has its wheel's tag, its libraries' suffix and its kinds; others have no kernels."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\n" + "".join(f"echo '#define {macro} 1'\n" for macro in macros.split()))
    compiler.chmod(0o755)
    target = hatch_build.target_of([str(compiler)])
    assert list(target.kinds) == kinds
    if kinds:
        assert (target.tag, target.suffix) == (tag, suffix)


def test_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The build goes on and says that there are no kernels, and why."""
    for compiler in ("/bin/false", str(tmp_path / "none")):
        monkeypatch.setenv("CXX", compiler)
        assert hatch_build.compile_kernels(tmp_path) == ([], "")
        assert "no C++ compiler" in capsys.readouterr().err
