"""What a training runs on: the device, its precision, its memory, and work that a GPU replays as one CUDA graph."""

import ctypes
import functools
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from ctbprn_lib import InputError

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
if hasattr(LIBC, "mallopt"):
    # glibc gives each large tensor fresh pages and hands them back at once, and half of a step goes into page faults;
    # with no mmap (M_MMAP_MAX = -4), no trimming (M_TRIM_THRESHOLD = -1) and growth by 256 MiB (M_TOP_PAD = -2) it
    # keeps them. PeakMemory trims once a fit.
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
        LIBC.mallopt(option, value)


def resolve_device(device):
    """torch.device for "auto", "cpu" or "cuda" (optionally with a number); InputError for anything else."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise InputError(f'device must be "auto", "cpu" or "cuda", got {device!r}')
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there: this machine has {torch.cuda.device_count()} CUDA GPUs")
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # as tensors there say it
    return resolved


def device_name(device):
    """The GPU's name, or "CPU, n threads"."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"CPU, {n} thread{'s' * (n > 1)}"


def resolve_precision(precision, device):
    """What "auto" stands for: tf32 on a GPU, bf16 on a CPU that multiplies in it (twice as fast), else fp32.

    Raises InputError for one that the device has not.
    """
    if precision == "tf32" and device.type == "cpu":
        raise InputError("precision tf32 needs a CUDA GPU; a CPU takes auto, fp32 or bf16")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "tf32"
    can = torch.cpu.get_capabilities()
    return "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "fp32"


def precision_context(precision, device):
    """A context factory for the forward pass; also sets how float32 products are computed on a GPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if precision == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def captured(work, generator):
    """work() as a callable that a GPU replays as one CUDA graph; on a CPU work itself.

    work reads and writes tensors that outlive it and draws from generator alone, which may be seeded between replays.
    On a GPU it has been run three times before, so what it changes is to be set afterwards.
    """
    device = generator.device
    if device.type == "cpu":
        return work
    with torch.cuda.device(device):
        stream, pool = _for_graphs(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels and take their workspace here
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            work()
    return graph.replay


@functools.cache
def _for_graphs(device):
    """The stream on which a device's graphs are captured, and the memory that they take turns in.

    Nothing in that memory is read after the replay that wrote it, so that any order of replays is safe.
    """
    return torch.cuda.Stream(), torch.cuda.graph_pool_handle()


def out_of_memory(error):
    """Whether an error of torch or Python says so; the CPU's allocator raises a bare RuntimeError."""
    said = re.search("(allocate|enough|out of) memory|bad_alloc", str(error))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or said is not None


class PeakMemory:
    """Growth of the peak memory since it was made, in MiB: of the CUDA device, else of this process (Linux)."""

    def __init__(self, device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux":
            if hasattr(LIBC, "malloc_trim"):
                LIBC.malloc_trim(0)  # else memory that an earlier fit left in the heap would hide this one's growth
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is used now
            self.start = self._status("VmRSS")

    def mib(self):
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.start) / 2**20
        return (self._status("VmHWM") - self.start) / 2**10 if hasattr(self, "start") else float("nan")

    @staticmethod
    def _status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))
