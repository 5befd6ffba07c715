"""A run's folder, runs/{env_id}__{exp_name}__{seed}__{time}, and the logs in it for TensorBoard."""

import dataclasses
import functools
import glob
import os
import re
import shutil
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from torch.utils.tensorboard import SummaryWriter

from experiment.code_identity import identity
from experiment.command_line import fail, warn
from experiment.processes import broadcast_object, rank_and_size
from experiment.stopping import StopSignals


def open_run(args, device, global_step, rank=0):
    """(run folder, writer): new ones or, with --resume, the run's own, at the step of its checkpoint.

    Logs all flags and the code's identity. Prints the folder, the number of processes, the device, and all flags that
    differ from their defaults, with tuned values and the precision filled in. Only the first process writes.
    """
    if rank > 0:
        return broadcast_object(None), NoWriter()
    resumed, table = args.resume is not None, dataclasses.asdict(args) | identity(type(args))
    run_folder = args.resume if resumed else make_run_folder(args)
    lock = lock_run_folder(run_folder)
    if args.track:
        start_tracking(run_folder, resumed, table)
    wait_for_new_name(run_folder)
    # TensorBoard then drops all later entries of a resumed run
    writer = Writer(run_folder, lock, purge_step=global_step + 1 if resumed else None)
    rows = "\n".join(f"|{name}|{value}|" for name, value in table.items())
    writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}", global_step)
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    changed = [f"{name} {value}" for name, value in vars(args).items() if value != defaults[name] and name != "resume"]
    print(f"{run_folder} on {rank_and_size()[1]} x {device}: {', '.join(changed)}")
    StopSignals.afterwards = ". Nothing can continue this run: --checkpoint-interval is 0"
    if args.checkpoint_interval or resumed:
        StopSignals.afterwards = f". To continue: python {table['script']} --resume {run_folder}"
    return broadcast_object(run_folder), writer


def run_name(args):
    """The name of a run's folder without the time at its end."""
    return re.sub(r"[^\w.+-]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}")


def make_run_folder(args):
    """Make and return a new folder."""
    name, now = run_name(args), int(time.time())
    while True:
        run_folder = os.path.join("runs", f"{name}__{now}")
        try:
            os.makedirs(run_folder)
            return run_folder
        except FileExistsError as error:
            if not os.path.isdir("runs"):
                fail(f"runs: {error.strerror}, expected a folder to write to")
            now += 1  # another run has started in this second
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}, expected a folder to write to")


def take_lock(descriptor):
    """Lock an open file or folder until it is closed. Returns False if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def lock_run_folder(run_folder):
    """Lock the folder, and fail if another process trains in it. Returns a descriptor: closing it ends the lock."""
    if fcntl is None:
        return None
    descriptor = os.open(run_folder, os.O_RDONLY)
    if not take_lock(descriptor):
        os.close(descriptor)
        fail(f"{run_folder} is being trained in by another process, expected a run that has stopped")
    return descriptor


def wait_for_new_name(run_folder):
    """Wait for a new second (at most 1 s): event files' names start with it, and TensorBoard reads in name order."""
    names = [name.split(".") for name in os.listdir(run_folder) if name.startswith("events.out.tfevents.")]
    time.sleep(min(max(max((int(parts[3]) for parts in names), default=0) + 1 - time.time(), 0), 1))


def start_tracking(run_folder, resumed, config):
    """Send all of TensorBoard's entries to Weights & Biases too. Call this before making the writer."""
    name = os.path.basename(os.path.abspath(run_folder))
    project = os.environ.get("WANDB_PROJECT", "kaleidoscope-mamujoco")
    settings = dict(project=project, name=name, id=name, resume="allow")  # wandb reads WANDB_ENTITY itself
    try:
        import wandb

        wandb.init(**settings, dir=run_folder, sync_tensorboard=True, save_code=True, config=config)
    except Exception as error:  # it is not installed, or there is no login
        if not resumed:
            shutil.rmtree(run_folder, ignore_errors=True)
        fail(f"--track: {error}; expected Weights & Biases (pip install wandb) and a login, or WANDB_MODE=offline")


class Writer(SummaryWriter):
    """A SummaryWriter that survives a full disk or a deleted folder: it then drops the entries of one minute."""

    silent_until = 0.0  # on time.monotonic()

    def __init__(self, run_folder, lock=None, **options):
        super().__init__(run_folder, **options)
        self.lock = lock

    def attempt(self, method, *args, **kwargs):
        if time.monotonic() < self.silent_until:
            return
        try:
            method(self, *args, **kwargs)
        except OSError as error:  # an earlier entry failed, since a thread writes them
            warn(f"{self.log_dir}: {error.strerror or error}; training goes on, a minute of its log is lost")
            self.file_writer = self.all_writers = None  # the next entry opens a new file
            self.silent_until = time.monotonic() + 60

    add_scalar = functools.partialmethod(attempt, SummaryWriter.add_scalar)
    add_image = functools.partialmethod(attempt, SummaryWriter.add_image)
    add_histogram = functools.partialmethod(attempt, SummaryWriter.add_histogram)

    def add_summary(self, summary, global_step):
        """Write a summary of TensorBoard's own type, such as a film."""
        self.attempt(lambda self: self._get_file_writer().add_summary(summary, global_step))

    def close(self):
        self.attempt(SummaryWriter.close)
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


class NoWriter:
    """The writer of all processes but the first: does nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def log_episodes(writer, infos, global_step):
    """Log mean return and mean length of the episodes that ended in a step, if any did."""
    if "episode" in infos:
        ended, episode = infos["_episode"], infos["episode"]
        writer.add_scalar("charts/episodic_return", episode["r"][ended].mean(), global_step)
        writer.add_scalar("charts/episodic_length", episode["l"][ended].mean(), global_step)


def log_scalars(writer, logs, charts, global_step):
    """Log `logs`, {name: scalar on the device}, and `charts`, {name: plain value}."""
    for name, value in (*logs.items(), *((f"charts/{name}", value) for name, value in charts.items())):
        writer.add_scalar(name, float(value), global_step)


def reached(interval, previous_step, step):
    """Whether a multiple of `interval` lies after previous_step and up to `step`; never if `interval` is 0."""
    return interval > 0 and step // interval > previous_step // interval


def print_outcome(run_folder, args, status):
    """Print what a finished run leaves behind and how to go on. status: "eval", the last return as text, if any."""
    script = identity(type(args))["script"]
    films = sorted(glob.glob(os.path.join(glob.escape(run_folder), "*.gif")), key=os.path.getmtime)
    lines = {}
    if "eval" in status:
        lines["return"] = f"{status['eval']} in {args.eval_episodes} episodes"
    lines["curves"] = f"tensorboard --logdir {run_folder}"
    if films:
        lines["film"] = films[-1]
    if args.save_model:
        lines["evaluate"] = f"python {script} --evaluate {run_folder}"
    print("\n".join(f"{name:>8}: {value}" for name, value in lines.items()))
