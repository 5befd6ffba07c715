"""An update as one launch: CUDA graphs and torch.compile around a function that changes tensors in place.

An update of networks this small is some thousand kernels of a few microseconds each; to launch them one by one from
Python takes longer than to run them. A CUDA graph is recorded once and is then launched as a whole.
"""

import contextlib
import importlib.util
import os
import shutil

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
