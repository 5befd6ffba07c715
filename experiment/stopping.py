"""What ends a run early: signals, and numbers that are not finite."""

import os
import signal
import sys

import torch

from experiment.command_line import fail, warn


class StopSignals:
    """Keeps the first SIGINT or SIGTERM in `received`: an evaluation then ends early, the loop after its round."""

    afterwards = ""  # how to continue the run, which open_run knows

    def __init__(self):
        self.received = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received is not None:  # the second one kills
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        now = "stopping after this round; a second signal stops at once"
        warn(f"{signal.Signals(number).name}: {now}{self.afterwards}")

    def exit(self):
        """Exit with the signal's code, 130 or 143. If only another process got a signal, exit with 143."""
        sys.exit(128 + (self.received or signal.SIGTERM))


def stop_if_diverged(learner, logs, num_updates, writer):
    """Exit with code 1 if a value of `logs`, {name: scalar}, or a parameter is not finite, and name the first such."""
    values = logs | dict(learner.named_parameters())
    finite = torch.stack([torch.isfinite(value).all() for value in values.values()]).tolist()
    if not all(finite):
        writer.close()
        name, value = list(values.items())[finite.index(False)]
        what = f"{name} is {value.item()}" if value.dim() == 0 else f"{name} has values that are not finite"
        fail(f"diverged: {what} at update {num_updates}; nothing was saved after it", code=1)
