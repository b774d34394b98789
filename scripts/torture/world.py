"""Tiny models and data, the commands that run on them, and processes to run these in: forked from one that has loaded
everything, so that a whole command takes a second or two."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import importlib
import io
import json
import os
import resource
import select
import shlex
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from bittern import cli, jobs
from bittern.demo import DIGITS
from families import SUPPORTED
from material import LABELS, TEXTS, save_text_model, write_tables

WATCH, FAIL, FAIL_FOREVER, SIGNAL, CALL = range(5)  # what the shim does at an operation
_NOTHING = ctypes.CFUNCTYPE(None)(0)


def shim() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.torture_start.argtypes = (
        *(ctypes.c_char_p, ctypes.c_int, ctypes.c_long),
        *2 * (ctypes.c_int,),
        type(_NOTHING),
    )
    library.torture_clock.argtypes = (ctypes.c_double,)
    library.torture_seen.restype = ctypes.c_long
    return library


@dataclass(frozen=True)
class Strike:
    """What happens to a process at its n-th file operation below a folder. log: a file for all of them."""

    folder: Path
    what: int = WATCH
    at: int = 0
    value: int = 0
    log: Path | None = None
    call: Callable[[], None] | None = None
    clock: float = 0.0

    def start(self) -> None:
        library = shim()
        log = -1 if self.log is None else os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.__dict__["kept"] = function = _NOTHING if self.call is None else type(_NOTHING)(self.call)
        library.torture_clock(self.clock)
        library.torture_start(os.fsencode(self.folder.resolve()), self.what, self.at, self.value, log, function)


@dataclass
class Ended:
    """How a process ended. signal: 0, or what killed it, -1 for too much time; grown: bytes that it took beyond what it
    began with; operations: on files, as the shim counted them."""

    code: int
    signal: int
    text: str
    seconds: float
    grown: int = 0
    operations: int = 0

    @property
    def clean(self) -> bool:
        """True if all that it said last is one line of an error, and no traceback."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return self.code == 1 and "Traceback" not in self.text and bool(lines) and lines[-1].startswith("error: ")

    def __str__(self) -> str:
        return f"exit {self.code}, signal {self.signal}, {self.seconds:.1f} s: {self.text[-600:]}"


@dataclass
class Process:
    """A forked process that runs a function; what it prints is kept."""

    work: Callable[[], Any]
    strike: Strike | None = None
    limit: int | None = None  # bytes of address space beyond what the process has
    seconds: int | None = None  # of computing
    environment: Mapping[str, str] = field(default_factory=dict)
    new_session: bool = True

    def __post_init__(self) -> None:
        self.start = time.monotonic()
        self.output = os.memfd_create("output")
        self.note = os.memfd_create("note")
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run()

    def _run(self) -> None:
        code = 70
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.dup2(self.output, 1)
            os.dup2(self.output, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            faulthandler.register(signal.SIGUSR1)  # where it is, if it does not end
            os.environ |= self.environment
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            if self.limit is not None:
                resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + self.limit,) * 2)
            if self.seconds is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (self.seconds,) * 2)
            if self.strike is not None:
                self.strike.start()
            try:
                self.work()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            note = {"grown": max(0, memory("VmHWM") - before), "seen": shim().torture_seen() if self.strike else 0}
            os.pwrite(self.note, json.dumps(note).encode(), 0)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)  # whatever was raised before the work began leaves 70

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120.0) -> Ended:
        handle = os.pidfd_open(self.pid)
        left = max(0.0, seconds - (time.monotonic() - self.start))
        in_time = bool(select.select([handle], [], [], left)[0])
        os.close(handle)
        if not in_time:
            self.send(signal.SIGUSR1)
            time.sleep(2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # and its children
        status = os.waitpid(self.pid, 0)[1]
        text = os.pread(self.output, 1 << 20, 0).decode(errors="replace")
        note = json.loads(os.pread(self.note, 1000, 0) or b"{}")
        for file in (self.output, self.note):
            os.close(file)
        ended = os.waitstatus_to_exitcode(status)
        number = -1 if not in_time else max(0, -ended)
        took = time.monotonic() - self.start
        return Ended(max(0, ended), number, text, took, note.get("grown", 0), note.get("seen", 0))


def memory(name: str) -> int:
    """Bytes of this process, as the kernel calls them: VmRSS, VmHWM (most so far), VmSize."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def type_in(line: str) -> None:
    """Run `bittern ...` in this process."""
    sys.argv = shlex.split(line)
    cli.main()


def in_two(line: str) -> None:
    """Run a command in two processes that train together, as torchrun starts them; ends as the first one does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    other = os.fork()
    os.environ |= known | dict.fromkeys(("RANK", "LOCAL_RANK"), "1" if not other else "0")
    if not other:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        shim().torture_start(b"", WATCH, 0, 0, -1, _NOTHING)  # the first process writes
    type_in(line)


def in_a_process(work: Callable[[], Any]) -> None:
    """Do something in a process of its own, so that this one stays fit to be forked."""
    ended = Process(work).wait(600)
    assert not ended.code, ended


# ---- what the commands run on


def build(folder: Path) -> None:
    """Write a text model, a ViT, tables, and a packed model, unless they are there."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_text_model(folder / "bert")
    write_tables(folder / "texts", text=TEXTS, label=LABELS)
    shutil.copytree(DIGITS, folder / "vit")
    os.chdir(folder)
    for name, recipe in (("packed", "w8a8"), ("low", "w4a8")):
        jobs.quantize("bert", recipe, name, data="texts", simulated=f"{name}-simulated")
    jobs.quantize("vit", "w4a8", "packed-vit", data="digits")
    (folder / "done").touch()


QAT = "bittern qat {w}/bert --data {w}/texts -r ternary --steps 12 --evaluations 4 --batch-size 8 --lr 1e-3 -o {o}/out"
PTQ = "bittern ptq {w}/bert --data {w}/texts -r w4a8 --samples 16 -o {o}/out"
COMMANDS = {
    "quantize": "bittern quantize {w}/bert --data {w}/texts -r w8a8 -o {o}/out",
    "ptq vt": f"{PTQ} --method vt",
    "ptq bittern": PTQ,
    "ptq adaround": f"{PTQ} --method adaround --samples 4",
    "ptq mixed": f"{PTQ} --method omse --target 6",
    "qat": QAT,
    "qat intervene": f"{QAT} --intervene gradual --intervene-steps 4",
    "qat two processes": QAT,
    "compress": "bittern compress {w}/bert --data {w}/texts --for size --max-loss 100 --samples 8 -o {o}/out",
    "export": "bittern export {w}/packed --to onnx --samples 8 -o {o}/out",
    "export file": "bittern export {w}/packed --to onnx --samples 8 -o {o}/model.onnx",
    "analyze": "bittern analyze {w}/packed --teacher {w}/bert --data {w}/texts --samples 8 --few 4 -o {o}/out",
}


def typed(name: str, world: Path, area: Path) -> Callable[[], None]:
    """Return what runs a command with its output in a folder. Run again it goes on: `qat` only if told to."""
    line = COMMANDS[name].format(w=world, o=area)
    if name.startswith("qat") and (area / "out.work").exists():
        line += " --resume"
    return lambda: (in_two if name == "qat two processes" else type_in)(line)


def warm_up() -> None:
    """Import whatever the commands will, so that forked processes need not."""
    for name in (
        *("bittern.jobs", "bittern.ladder", "bittern.analysis.study", "bittern.deploy.onnx.export", "bittern.show"),
        *("bittern.deploy.onnx.graph", "onnxruntime", "onnxscript", "onnx_ir", "datasets", "sklearn.datasets"),
        *("sklearn.model_selection", "torch._dynamo", "torch.onnx", "torch.distributed", "scipy.stats", "PIL.Image"),
        "peft",
    ):
        importlib.import_module(name)
    with contextlib.redirect_stdout(io.StringIO()):
        hf.AutoTokenizer  # noqa: B018
        SUPPORTED["bert"](), SUPPORTED["vit"]()
    torch.set_num_threads(1)


# ---- what they wrote

NOT_BITS = {"seconds", "peak_memory", "speed", "latency_ms", "faster", "source", "path", "out", "rungs", "name"}
NOT_BITS |= {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "student", "teacher"}
NOT_BITS |= {"data", "folder", "report", "text", "smaller"}


def bits(area: Path) -> dict[str, str]:
    """Digests of all files of a finished run, without times, places and drawings of them."""
    found = {}
    for file in sorted(p for p in area.rglob("*") if p.is_file() and ".rungs" not in str(p)):
        name, content = str(file.relative_to(area)), file.read_bytes()
        if file.suffix in (".html", ".svg", ".md") or file.name == ".bittern-files.json":
            content = b"exists"
        elif file.suffix == ".json":
            content = json.dumps(_without_times(json.loads(content)), sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in NOT_BITS}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def strays(area: Path) -> list[str]:
    """Names of what a finished run should not have left: temporary files and folders, work that is done."""
    found = [p.relative_to(area) for p in area.rglob("*") if p.name != ".bittern-files.json"]
    return [str(p) for p in found if p.name.startswith(".") or ".work" in str(p)]
