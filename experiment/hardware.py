"""What this machine can do: its devices, the precisions that it multiplies in, and its memory."""

import contextlib
import ctypes
import os

import torch

from experiment.command_line import fail, require, warn


def device_type(device):
    """cpu or cuda: what --device auto, cpu or cuda means here. Fails if it asks for a GPU and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device is cuda, expected cpu or auto: PyTorch finds no CUDA device here")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(precision, kind, auto_bfloat16=True, saved=None):
    """The precision that --precision means here. auto: TF32 on a GPU; on a CPU bfloat16 if it is native, else float32.

    Without `auto_bfloat16`, auto means float32 on every CPU. For a model in precision `saved`, auto means that one if
    the device has it, else float32. Also sets whether PyTorch multiplies float32 as TF32.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    here = {"bfloat16": native or kind == "cuda", "tf32": kind == "cuda"}
    if precision == "bfloat16" and not here["bfloat16"]:
        warn("this CPU does not multiply bfloat16 natively: --precision bfloat16 is slow here")
    if precision == "auto" and saved is not None:
        precision = saved if here.get(saved) else "float32"
    elif precision == "auto":
        precision = "tf32" if kind == "cuda" else "bfloat16" if native and auto_bfloat16 else "float32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return precision


def keep_freed_memory():
    """Let glibc keep freed memory. Otherwise, each update on the CPU gets its pages from the kernel anew."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD at its maximum: larger blocks still go back to the kernel
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def require_memory(what, needed, device):
    """Fail if the device has fewer than `needed` bytes: Linux would kill the run only once it has filled them."""
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows
        return
    expected = f"at most the {there / 1e9:.1f} GB of memory that this device has"
    require(needed <= there, f"{what}, which takes {needed / 1e9:.1f} GB, expected {expected}")
