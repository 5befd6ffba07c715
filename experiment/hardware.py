"""What the machine at hand can do."""

import contextlib
import ctypes
import os

import torch

from experiment.command_line import fail, require, warn


def device_type(device):
    """What auto, cpu or cuda means here: cpu or cuda. Fails where a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device is cuda, expected cpu or auto: PyTorch finds no CUDA device here")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(precision, kind, auto_bfloat16=True):
    """What --precision auto means: TF32 on a GPU, bfloat16 where a CPU multiplies it natively, else float32.

    Without `auto_bfloat16`, float32 on every CPU. Sets PyTorch's products of float32 to TF32 or to full precision.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "bfloat16" and kind == "cpu" and not native:
        warn("this CPU does not multiply bfloat16 natively: --precision bfloat16 is slow here")
    if precision == "auto":
        precision = "tf32" if kind == "cuda" else "bfloat16" if native and auto_bfloat16 else "float32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return precision


def keep_freed_memory():
    """Let glibc keep freed memory, since each update allocates tensors of the same sizes again.

    Otherwise each update on the CPU has to get those pages back from the kernel.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest value; larger blocks still go back to the kernel
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def require_memory(what, needed, device):
    """Refuse a buffer larger than memory now: Linux would kill the run only once it has filled. needed: bytes."""
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows
        return
    expected = f"at most the {there / 1e9:.1f} GB of memory that there are"
    require(needed <= there, f"{what}, which takes {needed / 1e9:.1f} GB, expected {expected}")
