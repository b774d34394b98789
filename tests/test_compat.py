"""Which versions of transformers Bittern takes, and what the others are told."""

import subprocess
import sys
import warnings

import pytest

from bittern.compat import INSTALLED, NEWEST, OLDEST, check_version


@pytest.mark.parametrize("minor", [OLDEST, NEWEST])
def test_tested_versions(minor: tuple[int, int]) -> None:
    """A version that the tests passed with, and any patch of it, is taken without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version(f"{minor[0]}.{minor[1]}.9")
        check_version(INSTALLED)


def test_newer_version_warns() -> None:
    """A newer minor version is taken with one line that says which ones were tested."""
    with pytest.warns(UserWarning, match=r"transformers 5\.99\.0\.dev0 is newer .* works with 5\.22 to"):
        check_version("5.99.0.dev0")


def test_older_version_is_refused() -> None:
    """An older minor version is refused with what to install."""
    with pytest.raises(ImportError, match=r"4\.57\.1 is too old; .* 5\.22 to .*: pip install -U transformers"):
        check_version("4.57.1")


def test_missing_name() -> None:
    """A version without a name that Bittern uses is refused on import, with the versions that have it."""
    code = "import transformers.utils.output_capturing as m; del m._active_collector; import bittern"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert f"ImportError: transformers {INSTALLED} lacks what Bittern uses" in ran.stderr
    assert "pip install 'transformers>=5.22,<5.25'" in ran.stderr
