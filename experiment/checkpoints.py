"""Checkpoints, from which a run goes on exactly.

A checkpoint holds all that the rest of a run depends on: where it is resumed on the same CPU, the run goes on bit for
bit as if it had never stopped. It is RUN_FOLDER/checkpoint.pt and, of every further process, a file beside it. Files
hold tensors and plain values (no code: they load with weights_only=True) and are replaced in one step.
"""

import contextlib
import dataclasses
import glob
import hashlib
import os
import time

import numpy as np
import torch

from experiment.command_line import fail, warn
from experiment.processes import any_process, rank_and_size

FORMAT = 5
DIGEST = "sha256"
REPLAY_ARRAYS = ("state", "actions", "reward", "terminated", "ended")
# what a resumed run may be given anew, since none of it changes what the run has learnt so far
MAY_CHANGE = {
    "resume",
    "total_timesteps",
    "device",
    "num_threads",
    "log_interval",
    "eval_interval",
    "eval_episodes",
    "save_model",
    "checkpoint_interval",
    "cudagraph",
    "compile",
    "capture_video",
    "render",
    "track",
}


# ---- Files ----
def write(path, content):
    """Save so that `path` holds the old content or the new, whole, whatever happens. Returns whether it is the new.

    A digest of the file is at its end, so that no change of it goes unnoticed; torch.load does not mind the digest.
    What goes wrong, such as a full disk or a folder that is gone, is reported on stderr, and the old file stays.
    """
    try:
        with open(f"{path}.tmp", "w+b") as file:
            torch.save(content, file)
            file.seek(0)
            file.write(hashlib.file_digest(file, DIGEST).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).split("\n")[0]
        warn(f"{path}: {reason}; training goes on, and what was there before stays")
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        return False
    return True


def read(path, device="cpu"):
    """The dict that `write` wrote to a file, with its tensors on the device. ValueError if the file has changed."""
    digest = hashlib.new(DIGEST)
    left = os.stat(path).st_size - digest.digest_size
    if left < 0:  # a pipe or a device too, which could be read without end
        raise ValueError("not as it was written")
    with open(path, "rb") as file:  # torch.load does not look at the checksums in the file
        while left > 0:
            digest.update(file.read(min(left, 2**20)))
            left -= 2**20
        if digest.digest() != file.read(digest.digest_size):
            raise ValueError("not as it was written")
    content = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}")
    return content


@contextlib.contextmanager
def refuse_damage(path, expected):
    """Within it, whatever a damaged or foreign file raises ends in one line: what that is depends on where it breaks.

    `path` is what the line begins with, and `expected` what it ends with.
    """
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
        fail(f"{path}: {reason}; expected {expected}")


# ---- Checkpoints ----
def write_checkpoint(run_folder, writer, learner, envs, obs, counters, logs=None, replay=None):
    """Write all that the rest of the run depends on, and log the seconds it took.

    learner: a module with a list `optimizers` and the arguments as `args`; counters: plain numbers, the step first;
    logs: the latest losses by name; replay: MATD3's. What optimisers are set to, such as learning rates, is not in it:
    that follows from the arguments and the step.
    """
    start = time.perf_counter()
    random, device = {"cpu": torch.get_rng_state()}, next(learner.parameters()).device
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    rank, processes = rank_and_size()
    shared = {
        "format": FORMAT,
        "processes": processes,
        "args": dataclasses.asdict(learner.args),
        "learner": learner.state_dict(),
        "optimizers": [optimizer.state_dict()["state"] for optimizer in learner.optimizers],
        "counters": list(counters),
        "logs": logs or {},
    }
    env_state = envs.get_state().items()
    own = {
        "envs": {name: torch.as_tensor(x) if isinstance(x, np.ndarray) else x for name, x in env_state},
        "obs": torch.as_tensor(obs),
        "random": random,
        "replay": None if replay is None else pack_replay(replay),
    }
    # the first process's file comes last: it says from which step the others' have to be, and so these, and their
    # older ones, stay until it is whole
    path = process_file(run_folder, rank, counters[0])
    written = rank == 0 or write(path, own)
    if not any_process(not written, device):
        written = rank > 0 or write(os.path.join(run_folder, "checkpoint.pt"), shared | own)
        if not any_process(not written, device) and rank > 0:
            for older in set(glob.glob(process_file(glob.escape(run_folder), rank, "*"))) - {path}:
                os.remove(older)
    writer.add_scalar("charts/checkpoint_seconds", time.perf_counter() - start, counters[0])


def process_file(run_folder, rank, step):
    return os.path.join(run_folder, f"checkpoint_process{rank}_{step}.pt")


def read_checkpoint(run_folder, args_class):
    """What write_checkpoint wrote, checked, with its arguments as an args_class and its path as "path"."""
    path = os.path.join(run_folder, "checkpoint.pt")
    with refuse_damage(f"--resume: {path}", "a checkpoint that --checkpoint-interval wrote"):
        checkpoint = read(path)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"format {checkpoint['format']} of another version of this code, not {FORMAT}")
        differing = {field.name for field in dataclasses.fields(args_class)} ^ set(checkpoint["args"])
        if differing:
            raise ValueError(f"{', '.join(sorted(differing))}: flags of this script or of the run's, but not of both")
        return checkpoint | {"args": args_class(**checkpoint["args"]), "path": path}


def check_resumed(args, checkpoint):
    """The arguments, if the run can go on with them; fails if not."""
    before, step = checkpoint["args"], checkpoint["counters"][0]
    for name, old in dataclasses.asdict(before).items():
        new, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if new != old and name not in MAY_CHANGE:
            fail(f"{flag} is {new}, expected {old} beside --resume {args.resume}: so the run has learnt until now")
    *_, eval_due = checkpoint["counters"]  # a signal had ended the evaluation at this step early
    if args.total_timesteps <= step and not eval_due:
        expected = f"more than the {step} steps that the run in {args.resume} has made"
        fail(f"--total-timesteps is {args.total_timesteps}, expected {expected}")
    if args.total_timesteps != before.total_timesteps:
        what = "resets and falling learning rates follow the new one from here on"
        print(f"--total-timesteps is {args.total_timesteps} and was {before.total_timesteps}: {what}")
    return args


def restore_checkpoint(checkpoint, learner, envs, replay=None):
    """Put learner, environments, generators and replay back where they were.

    Returns obs, counters and logs, as write_checkpoint was given them.
    """
    device, (rank, processes) = next(learner.parameters()).device, rank_and_size()
    path, expected = checkpoint["path"], "a whole checkpoint of this script"
    if processes != checkpoint["processes"]:
        fail(f"--resume: {path} is of {checkpoint['processes']} processes, expected as many, not {processes}")
    if rank > 0:
        path = process_file(os.path.dirname(path), rank, checkpoint["counters"][0])
        with refuse_damage(f"--resume: {path}", expected):
            checkpoint |= read(path)
    with refuse_damage(f"--resume: {path}", expected):
        learner.load_state_dict(checkpoint["learner"])
        for optimizer, state in zip(learner.optimizers, checkpoint["optimizers"], strict=True):
            # what it is set to belongs to this device, as capturable does
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        arrays = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in checkpoint["envs"].items()}
        envs.set_state(arrays)
        if replay is not None:
            unpack_replay(replay, checkpoint.pop("replay"))  # and frees this copy of it
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if device.type == "cuda" and "cuda" in checkpoint["random"]:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], device)
        logs = {name: value.to(device) for name, value in checkpoint["logs"].items()}
        return checkpoint["obs"].numpy(), checkpoint["counters"], logs


def pack_replay(replay):
    """A copy of what is stored and where: next states only where the following row does not hold them."""
    filled = int(replay.filled)
    saved = {name: getattr(replay, name)[:filled].clone() for name in REPLAY_ARRAYS}
    following = (torch.arange(filled) + 1) % replay.rows
    known = (replay.next_state[:filled] == replay.state[following]).all(-1)
    saved |= {"known": known, "next_state": replay.next_state[:filled][~known]}
    return saved | {"newest": int(replay.newest), "rows": replay.rows}


def unpack_replay(replay, saved):
    """Store what pack_replay returned, in the same rows of a ring that has at least as many as are filled."""
    filled, known = len(saved["state"]), saved["known"]
    for name in REPLAY_ARRAYS:
        getattr(replay, name)[:filled] = saved[name]
    following = (torch.arange(filled) + 1) % saved["rows"]
    replay.next_state[:filled] = replay.state[following]
    replay.next_state[:filled][known.logical_not()] = saved["next_state"].to(replay.state.device)
    replay.next_row = (saved["newest"] + 1) % replay.rows
    replay.newest.fill_(saved["newest"])
    replay.filled.fill_(filled)
