"""What ends a run before its time: signals, and numbers that are not finite."""

import os
import signal
import sys

import torch

from experiment.command_line import fail, warn


class StopSignals:
    """Remembers the first SIGINT or SIGTERM in `received`, for the loop to end its round; a second one ends at once."""

    def __init__(self):
        self.received = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        warn(f"{signal.Signals(number).name}: stopping after this round; a second signal stops at once")

    def exit(self):
        """End with the exit code of the signal, 130 or 143; that of another process counts as SIGTERM."""
        sys.exit(128 + (self.received or signal.SIGTERM))


def stop_if_diverged(learner, logs, num_updates, writer):
    """End with exit code 1 and a line that names what is not finite: of `logs`, scalars by name, else a parameter."""
    values = logs | dict(learner.named_parameters())
    finite = torch.stack([torch.isfinite(value).all() for value in values.values()]).tolist()
    if not all(finite):
        writer.close()
        name, value = list(values.items())[finite.index(False)]
        what = f"{name} is {value.item()}" if value.dim() == 0 else f"{name} has values that are not finite"
        fail(f"diverged: {what} at update {num_updates}; nothing was saved after it", code=1)
