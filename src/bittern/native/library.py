"""The compiled kernels: one library for each kind of CPU, of which this process loads one.

The best kind that the machine runs is loaded on first use, or the one that the environment variable BITTERN_KERNELS
names: `amx`, `avx512`, `avx2`, on arm64 `i8mm`, `dotprod`, `neon`, or `none` for a process without kernels.
"""

import ctypes
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling

from bittern.errors import InputError
from bittern.native import structures as c

Function = TypeVar("Function", bound=Callable[..., Any])
SWITCH = "BITTERN_KERNELS"
INTERFACE = 9  # see bittern_interface in kernels.cpp
SWITCHED_OFF = "the kernels are switched off"  # by `disabled` or BITTERN_KERNELS=none

# Best first: what it is called, and what the CPU must have.
_KINDS = {
    "amx": ("avx512vl", "avx512bw", "avx512dq", "avx512_vnni", "amx_tile", "amx_int8"),
    "avx512": ("avx512vl", "avx512bw", "avx512dq", "avx512_vnni"),
    "avx2": ("avx2", "fma", "bmi2"),
    "i8mm": ("dotprod", "i8mm"),
    "dotprod": ("dotprod",),
    "neon": ("neon",),
}
# Where systems say what a CPU has: on macOS by name; Linux on arm64 in a bit of one of getauxval's words.
_MACOS = {
    "avx2": "hw.optional.avx2_0",
    "fma": "hw.optional.fma",
    "bmi2": "hw.optional.bmi2",
    "neon": "hw.optional.neon",
    "dotprod": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
}
_HWCAP, _HWCAP2 = 16, 26
_ARM_LINUX = {"neon": (_HWCAP, 1 << 1), "dotprod": (_HWCAP, 1 << 20), "i8mm": (_HWCAP2, 1 << 13)}


class _Engine(NamedTuple):
    library: ctypes.CDLL | None
    kind: str = ""
    why_none: str = ""


_engine: _Engine | None = None  # what was loaded, once somebody asked
_allowed, _forked = True, False  # forked: a child of fork(), without OpenMP's threads
os.register_at_fork(after_in_child=lambda: globals().update(_forked=True))


@cache
def _cpu_flags() -> frozenset[str]:
    if sys.platform == "darwin":
        return frozenset(flag for flag, name in _MACOS.items() if _sysctl(name))
    if platform.machine() == "aarch64":
        word = ctypes.CDLL(None).getauxval
        word.argtypes, word.restype = (ctypes.c_ulong,), ctypes.c_ulong
        return frozenset(flag for flag, (which, bit) in _ARM_LINUX.items() if word(which) & bit)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _sysctl(name: str) -> bool:
    """True if macOS knows the name and its number is not 0."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    out = ctypes.byref(value), ctypes.byref(size)
    return ctypes.CDLL(None).sysctlbyname(name.encode(), *out, None, ctypes.c_size_t(0)) == 0 and value.value != 0


def kinds() -> list[str]:
    """The libraries that were built and that this machine can run, best first."""
    return [kind for kind, needs in _KINDS.items() if _file(kind).exists() and _cpu_flags().issuperset(needs)]


def _file(kind: str) -> Path:
    return Path(__file__).with_name(f"libbittern-{kind}.{'dylib' if sys.platform == 'darwin' else 'so'}")


def use(kind: str | None = None) -> None:
    """Load the kernels of this kind: by default what BITTERN_KERNELS says, else the best. Raises ValueError if this
    machine cannot run them, InputError if BITTERN_KERNELS asks for what cannot be."""
    global _engine  # noqa: PLW0603
    asked = os.environ.get(SWITCH) if kind is None else None
    if asked == "none":
        _engine = _Engine(None, why_none=SWITCHED_OFF)
        return
    if asked and asked not in _KINDS:
        raise InputError(f"{SWITCH} is {asked!r}; expected {', '.join(_KINDS)} or none")
    wanted, options = kind or asked, kinds()
    for option in options if not wanted else {wanted} & {*options}:
        if (library := _load(_file(option))) is not None:
            _engine = _Engine(library, option)
            return
    runs = f"this machine runs {', '.join(options) or 'none'}"
    if asked:
        raise InputError(f"{SWITCH} is {asked!r}; {runs}")
    if kind is not None:
        raise ValueError(f"no library {kind!r} for this machine; {runs}")
    if not (built := [name for name in _KINDS if _file(name).exists()]):
        why = "no kernels were compiled here: no C++ compiler, or neither Linux nor macOS on x86-64 or arm64"
    elif options:
        why = "the kernels were compiled from other sources than these; install Bittern again"
    else:
        why = f"this CPU runs none of the kernels that were built ({', '.join(built)})"
    _engine = _Engine(None, why_none=why)


def _load(file: Path) -> ctypes.CDLL | None:
    """None if the system grants no AMX, or the library is not of these sources, as after a `git pull`."""
    library = ctypes.CDLL(str(file))
    openmp = None if _forked else getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    if getattr(library, "bittern_interface", int)() != INTERFACE or library.bittern_start(openmp) != 0:
        return None
    if openmp is None and not _forked:
        warnings.warn("the kernels use one thread: this PyTorch was built without OpenMP", stacklevel=2)
    p, i, f, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
    for name, arguments in {
        "pack": (p, i, i, i, p),
        "unpack": (p, i, i, i, p),
        "quantize": (p, i, ctypes.POINTER(c.Format), i, ctypes.POINTER(c.Codes)),
        "round": (p, n, i, ctypes.POINTER(c.Format), i, p),
        "round_ternary": (p, n, n, f, f, i, p),
        "losses": (ctypes.POINTER(c.Losses), i),
        "product": (ctypes.POINTER(c.Layer), p, i, i, p),
        "linear": (ctypes.POINTER(c.Codes), ctypes.POINTER(c.Layer), i, i, p),
        "convolve": (p, ctypes.POINTER(c.Convolution), ctypes.POINTER(c.Layer), i, p),
        "norm": (p, i, i, p, p, f, i, p),
        "activate": (p, n, i, i, p),
        "attention": (ctypes.POINTER(c.Attention), i),
        "blocks": (p, i, p, i, i, p, p, i, p),
        "project": (p, p, i, i, i, p, p, p),
        "finish": (p, p, i, i, p, p, p, i, p, p, i, p),
        "rows": (ctypes.POINTER(c.Lookup), p, i, p),
        "multiply_floats": (ctypes.POINTER(c.Lookup), p, i, p, i, p),
    }.items():
        getattr(library, f"bittern_{name}").argtypes = arguments
    # keeps the interpreter's lock
    library.bittern_unchanged = ctypes.PyDLL(str(file)).bittern_unchanged  # type: ignore[attr-defined]
    return library


def _loaded() -> _Engine:
    if _engine is None:
        use()
    assert _engine is not None
    return _engine


def engine() -> tuple[str, str]:
    """Name of the kernels in use, empty if there are none, and then why."""
    found = _loaded()
    return (found.kind, found.why_none) if _allowed or found.library is None else ("", SWITCHED_OFF)


def available() -> bool:
    """True if integer kernels run here, now."""
    return _allowed and _loaded().library is not None


def required(*, even_disabled: bool = False) -> ctypes.CDLL:
    """Return the library. Raises RuntimeError if there is none, or it is switched off by `disabled`."""
    library = _loaded().library
    if library is None or not (_allowed or even_disabled):
        raise RuntimeError(f"no integer kernels: {engine()[1]}")
    return library


def run(name: str, *arguments: Any) -> bool:
    """Call a function of the library: False if it met what the kernels do not serve. Raises MemoryError."""
    result: int = getattr(required(), f"bittern_{name}")(*arguments)
    if result == 2:
        raise MemoryError("no memory for the kernels' buffers")
    return result == 0


# Takes, in this context, the calls of functions whose inside no record of operations can show: see `deploy.tape`.
recorder: ContextVar[Any] = ContextVar("recorder", default=None)


def one_step(function: Function) -> Function:
    """Let a record hold the call of a function instead of what the function does."""

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        recording = recorder.get()
        return function(*args, **kwargs) if recording is None else recording.whole(function, args, kwargs)

    return either  # type: ignore[return-value]


@contextmanager
def disabled() -> Iterator[None]:
    """Inside the block packed models compute as the simulated model does: unpacked weights, float products, and PyTorch
    alone rounds."""
    global _allowed  # noqa: PLW0603
    was, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = was


def serves(*tensors: Tensor | None) -> bool:
    """True if kernels may work on these tensors now: float32 on the CPU, no gradients, nothing that traces."""
    if is_compiling() or _get_tracing_state() is not None or not available():
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is not None:
            plain = type(t) in (Tensor, torch.nn.Parameter) and not is_functorch_wrapped_tensor(t)
            if not plain or t.dtype is not torch.float32 or not t.is_cpu or (grad and t.requires_grad):
                return False
    return True


def address(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Return the address of a tensor that is what the kernels take it for. Raises ValueError if it is not."""
    if tensor.dtype != dtype or not tensor.is_cpu or tensor.shape != shape:
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} is {found}; expected {dtype} {shape} on cpu")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
    return tensor.data_ptr()


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor that was checked; None for none."""
    return None if tensor is None else tensor.data_ptr()


def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory for the kernels to write: on the CPU and of this type, whatever PyTorch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")
