"""Runs of the scripts as a user makes them, in this process or in one of their own, and what they leave behind."""

import contextlib
import io
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from experiment import mask_pictures

ROOT = Path(__file__).resolve().parent.parent
# flags of tiny runs on any task
# crosses the warm-up, policy updates, both resets and two evaluations
TINY_MATD3 = "--device cpu --total-timesteps 640 --warmup-steps 200 --batch-size 32 --num-envs 4 --train-interval 10"
TINY_MATD3 += " --updates-per-round 4 --hidden-size 32 --eval-interval 300 --eval-episodes 3 --episode-limit 30"
TINY_MATD3 += " --log-interval 100 --actor-reset-interval 150 --critic-reset-interval 100 --actor-threshold-bias 0"
TINY_MATD3 += " --save-model --checkpoint-interval 300 --num-threads 1"
# rollouts of 40 steps: crosses time limits in mid-rollout, both resets and two evaluations
TINY_MAPPO = "--device cpu --total-timesteps 630 --num-envs 4 --rollout-steps 10 --num-epochs 2 --num-minibatches 2"
TINY_MAPPO += " --hidden-size 32 --eval-interval 300 --eval-episodes 3 --episode-limit 17 --log-interval 100"
TINY_MAPPO += " --actor-reset-interval 150 --actor-threshold-bias 0 --save-model --num-threads 1"
TINY_MAPPO += " --checkpoint-interval 300"
TIMES = ("charts/SPS", "charts/checkpoint_seconds")  # what differs from run to run
# event files of one second and process are read in the order of this number as text, which 9 and 10 would spoil
event_file_writer._global_uid = event_file_writer.AtomicCounter(1000)


class SignalInBlock:
    """Stands in for StopSignals, without handlers: as if SIGTERM came in block number `block`."""

    def __init__(self, block):
        self.block, self.seen = block, 0

    @property
    def received(self):
        if sys._getframe(1).f_code.co_name == "main":  # the loop asks once a block; evaluations ask at every step
            self.seen += 1
        return signal.SIGTERM if self.seen >= self.block else None

    def exit(self):
        sys.exit(128 + signal.SIGTERM)


def blank_picture(network, name):
    """Stands in for mask_pictures.draw, which would take most of the time of a tiny run."""
    blank = SimpleNamespace(draw=lambda: None, buffer_rgba=lambda: np.zeros((2, 2, 4), np.uint8))
    return SimpleNamespace(canvas=blank)


def run_main(script, *flags, cwd, block=math.inf):
    """(exit code, stdout, stderr) of main() in this process, up to a signal in `block`, with blank pictures of masks.

    That saves the seconds that a process of its own takes to start.
    """
    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        patch.setattr(script, "StopSignals", lambda: SignalInBlock(block))
        patch.setattr(mask_pictures, "draw", blank_picture)
        try:
            script.main()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def environment(**changes):
    """Of a process of its own: one thread, and our modules to import from anywhere, those of the tests too."""
    modules = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": modules} | changes


def run_process(script, *flags, cwd, **changes):
    """(exit code, stdout, stderr) of the script, a module or a path, in a process of its own."""
    command = [sys.executable, str(getattr(script, "__file__", script)), *map(str, flags)]
    variables = environment(TERM="dumb", COLUMNS="100", **changes)
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def one_line(err):
    return len(err.splitlines()) == 1 and err.startswith("error: ")


def scalars(run_folder):
    """{tag: [(step, value), ...]} of all event files of a run."""
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def curves(run_folder):
    """The scalars without those that measure time."""
    return {tag: series for tag, series in scalars(run_folder).items() if tag not in TIMES}


def write_run(folder, curves, hyperparameters=None, purge_step=None):
    """Add an event file with {tag: {step: value}} to a run's folder, later in name than those in it."""
    number = len(list(folder.glob("events*")))
    writer = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=".new")
    if hyperparameters:
        rows = "\n".join(f"|{name}|{value}|" for name, value in hyperparameters.items())
        writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}")
    for tag, curve in curves.items():
        for step, value in curve.items():
            writer.add_scalar(tag, value, step)
    writer.close()
    (new,) = folder.glob("*.new")
    new.rename(folder / f"events.out.tfevents.{number:010d}.name")
    return folder


def expand(pattern):
    """The words that a shell makes of one with braces."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    return [word for part in braces[1].split(",") for word in expand(pattern.replace(braces[0], part, 1))]
