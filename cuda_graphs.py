"""An update as one launch: CUDA graphs and torch.compile around a function that changes tensors in place.

An update of networks this small is some thousand kernels of a few microseconds each; to launch them one by one from
Python takes longer than to run them. A CUDA graph is recorded once and is then launched as a whole.
"""

import contextlib
import importlib.util
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist


def compiler_for(device_type):
    """(whether there is what torch.compile needs for a device, what that is)."""
    if device_type == "cuda":
        return importlib.util.find_spec("triton") is not None, "Triton"
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    return any(shutil.which(name) for name in names), "a C++ compiler (g++, clang++ or cl)"


class OneLaunch:
    """Calls `function`, with torch.compile and on CUDA as a graph, where asked for.

    The function takes nothing, returns a dict of tensors, and changes others in place. It must not wait for the device,
    and nothing but tensors' values may change between two calls: a graph does again, on the same memory, what was
    recorded. Random numbers are new in every call, and the same as without a graph. The tensors returned are the same
    ones each time, with new values.

    Each call is a whole one: the first few run as they are, so that what is made once (Adam's moments, the libraries'
    workspaces, compiled code) is made outside the graph; to record changes nothing, and is followed by a launch.
    """

    CALLS_BEFORE_RECORDING = 3

    def __init__(self, function, device, cudagraph=True, compile=False):
        if compile:
            torch._inductor.config.fallback_random = True  # draws what it would draw if it were not compiled
            function = torch.compile(function)
        self.function, self.graph, self.results, self.calls = function, None, None, 0
        # several processes average gradients in the middle of an update, which has not been tried in a graph
        self.records = cudagraph and device.type == "cuda" and not dist.is_initialized()
        self.stream = torch.cuda.Stream(device) if self.records else None

    def __call__(self):
        if not self.records:
            return self.function()
        if self.calls < self.CALLS_BEFORE_RECORDING:
            self.calls += 1
            with self.on_side_stream():
                return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # others may act meanwhile
                self.results = self.function()
        self.graph.replay()
        return self.results

    @contextlib.contextmanager
    def on_side_stream(self):
        """As in recording, which cannot be on the default stream: gradients remember the stream they were made on."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            yield
        here.wait_stream(self.stream)


class Beside:
    """Acting, where `overlap` is set beside the updates: in a thread, a CUDA stream and a generator of its own.

    Without, it is done at once, and draws from the default generator.
    """

    def __init__(self, device, overlap, seed):
        self.pool = ThreadPoolExecutor(1, "acting") if overlap else None
        self.generator = torch.Generator(device).manual_seed(seed) if overlap else None
        self.stream = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None
        self.device = device

    def to_device(self, array):
        """A NumPy array as a tensor on the device; to a GPU by way of pinned memory, without waiting for it."""
        tensor = torch.as_tensor(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def start(self, function, *arguments):
        """A Future of function(*arguments), which may read what this thread has launched so far."""
        if self.pool is None:
            future = Future()
            future.set_result(function(*arguments))
            return future
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        return self.pool.submit(self.run, function, arguments)

    def run(self, function, arguments):
        with torch.cuda.stream(self.stream):  # None changes nothing
            return function(*arguments)
