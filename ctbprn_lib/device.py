"""The hardware that a training runs on: its device, precision and memory, and work that a GPU replays as one graph."""

import ctypes
import functools
import math
import platform
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ctbprn_lib import InputError

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None  # Any: its functions are looked up as it runs
# Options of glibc's mallopt, as malloc.h numbers them.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def _keep_freed_memory() -> None:
    """Make glibc keep memory that is freed, for all of this process.

    By default glibc takes fresh pages for each large tensor and gives them back at once. Half of a step then goes into
    page faults. So glibc shall use no mmap, never trim the heap, and let the heap grow by 256 MiB at a time.
    PeakMemory trims the heap once for each fit.
    """
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_MMAP_MAX, 0)
        LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        LIBC.mallopt(M_TOP_PAD, 2**28)


_keep_freed_memory()


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch.device for "auto", "cpu" or "cuda", the last optionally with a number ("cuda:1").

    "auto" is a CUDA GPU if there is one, else the CPU. A CUDA device is returned with its number.
    Raises InputError for anything else, and for a GPU that this machine does not have.
    """
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(name)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise InputError(f'device must be "auto", "cpu" or "cuda", got {name!r}')
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()} CUDA GPUs")
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # tensors on that GPU name their device with a number
    return resolved


def device_name(device: str | torch.device) -> str:
    """The name of a GPU, or "CPU, n threads"."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"CPU, {n} thread{'s' * (n > 1)}"


def processor_name() -> str:
    """The CPU's name as Linux tells it ("AMD EPYC"), or what Python knows of it elsewhere."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def resolve_precision(precision: str, device: torch.device) -> str:
    """The precision that a training uses: "fp32", "tf32" or "bf16".

    precision: one of PRECISIONS. "auto" stands for tf32 on a GPU, for bf16 on a CPU that has instructions for products
    in bf16 (it is twice as fast there), and for fp32 on any other CPU.
    Raises InputError for tf32 on a CPU.
    """
    if precision == "tf32" and device.type == "cpu":
        raise InputError("precision tf32 needs a CUDA GPU; a CPU takes auto, fp32 or bf16")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "tf32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def precision_context(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A function that makes the context manager for a forward pass in a precision ("fp32", "tf32" or "bf16").

    The call also sets, for all of this process, how a GPU computes products of float32.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if precision == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def captured(work: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
    """A function that does the same as work; on a GPU it replays work as one CUDA graph.

    work: reads and writes tensors that stay alive and in place, and draws from generator alone. generator: may be
    seeded again between two calls. It names the device.
    On a CPU this is work itself. On a GPU work runs three times here, so set the tensors that it changes afterwards.
    """
    device = generator.device
    if device.type == "cpu":
        return work
    with torch.cuda.device(device):
        stream, pool = _stream_and_pool(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # in these runs libraries choose their kernels and take their workspace
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            work()
    return graph.replay


@functools.cache
def _stream_and_pool(device: torch.device) -> tuple[torch.cuda.Stream, Any]:
    """The stream on which the graphs of a device are captured, and the pool of memory that they share.

    They can share it because no graph reads there what another call has written, so they may be replayed in any order.
    """
    return torch.cuda.Stream(), torch.cuda.graph_pool_handle()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python means that memory ran out.

    The allocator of the CPU raises a plain RuntimeError, so its message is read too.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return re.search("(allocate|enough|out of) memory|bad_alloc", str(error)) is not None


class PeakMemory:
    """How far the peak memory has grown since this object was made.

    The memory is that of the CUDA device or, for a CPU, that of this process. The latter is measured on Linux alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start: int | None = None  # bytes on a GPU, KiB of this process, None where nothing is measured
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux":
            if hasattr(LIBC, "malloc_trim"):
                LIBC.malloc_trim(0)  # else memory that an earlier fit left in the heap would hide this one's growth
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is used now
            self.start = self._status("VmRSS")

    def mib(self) -> float:
        """The growth in MiB; NaN where it is not measured."""
        if self.start is None:
            return math.nan
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.start) / 2**20
        return (self._status("VmHWM") - self.start) / 2**10

    @staticmethod
    def _status(key: str) -> int:
        """The number of KiB that Linux reports for this process under a key."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))
