"""Checkpoints, for runs to continue exactly.

A checkpoint holds everything that the rest of a run depends on: resumed on the same CPU, the run continues bit for bit
as if it had never stopped. The first process writes RUN_FOLDER/checkpoint.pt, the others a file each beside it. Files
hold tensors and plain values (no code: they load with weights_only=True) and are replaced in one step.
"""

import contextlib
import copy
import dataclasses
import glob
import hashlib
import os
import time
import typing
from pickle import UnpicklingError
from zipfile import BadZipFile

import numpy as np
import torch

from experiment.code_identity import check_identity, identity
from experiment.command_line import check_ranges, fail, require, warn
from experiment.processes import any_process, rank_and_size

FORMAT = 6
DIGEST = "sha256"
SIZES = "hidden_size num_critics deque_len num_envs"
REPLAY_ARRAYS = ("state", "actions", "reward", "terminated", "ended")
# flags that --resume may change, since they do not change what the run has learnt so far
MAY_CHANGE = {"resume", "total_timesteps", "device", "num_threads", "cudagraph", "compile", "track", "render"}
MAY_CHANGE |= {"log_interval", "eval_interval", "eval_episodes", "checkpoint_interval", "save_model", "capture_video"}


# ---- Files ----
def write(path, content):
    """Save atomically: `path` holds all of the old content or all of the new. Returns True if it is the new.

    A digest ends the file and shows any later change; torch.load ignores it. A failure, such as a full disk or a
    deleted folder, is reported on stderr, and the old file stays.
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
        warn(f"{path}: {reason}; training goes on, and the old file stays")
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        return False
    return True


def read(path, device="cpu"):
    """The dict that `write` wrote, with its tensors on the device. ValueError if the file has changed since."""
    digest = hashlib.new(DIGEST)
    left = os.stat(path).st_size - digest.digest_size
    if left < 0:  # also a pipe or a device, which may have no end
        raise ValueError("not as it was written")
    with open(path, "rb") as file:  # torch.load does not look at the checksums in the file
        while left > 0:
            digest.update(file.read(min(left, 2**20)))
            left -= 2**20
        if digest.digest() != file.read(digest.digest_size):
            raise ValueError("not as it was written")
    # mmap: on the CPU, tensors stay in the file until they are used, so a replay buffer is not in memory twice
    content = torch.load(path, map_location=device, weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}")
    return content


@contextlib.contextmanager
def refuse_damage(path, expected):
    """Turn an error of reading a file into one line that starts with `path` and ends with `expected`.

    Where a file is damaged decides which error it raises. Other errors, as of changed networks, keep their traceback.
    """
    try:
        yield
    except (NotImplementedError, RecursionError):  # the RuntimeErrors that do not come from reading
        raise
    except (OSError, EOFError, LookupError, TypeError, ValueError, RuntimeError, UnpicklingError, BadZipFile) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
        if "loading state_dict" in reason:
            reason = "its networks have other names or shapes than this code's: another version of the code wrote it"
        fail(f"{path}: {reason}; expected {expected}")


def has_type(value, kind):
    """Whether a value fits a flag's annotation."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and ... not in options:
        return type(value) is tuple and len(value) == len(options) and all(map(has_type, value, options))
    fits = type(value) in (kind, origin) or kind is float and type(value) is int
    return fits or value in options or any(has_type(value, option) for option in options)


def check_args(values, args_class, tensors, sizes, path):
    """args_class(**values), of values from the file `path`. Refuses values that no flag allows.

    Also refuses a flag among `sizes` that exceeds all dimensions of the file's tensors: its networks might fill memory.
    """
    for name, kind in typing.get_type_hints(args_class).items():
        if name in values and not has_type(values[name], kind):
            raise ValueError(f"{name} is {values[name]!r}, expected {kind if typing.get_args(kind) else kind.__name__}")
    args, largest = args_class(**values), max(size for tensor in tensors for size in tensor.shape)
    check_ranges(args, f"{path}: ")
    for name in sizes.split():
        if getattr(args, name, 0) > largest:
            raise ValueError(f"{name} is {getattr(args, name)}, expected at most {largest}, the largest tensor's size")
    return args


# ---- Checkpoints ----
def write_checkpoint(run_folder, writer, learner, envs, obs, counters, logs=None, replay=None):
    """Write everything that the rest of the run depends on, and log the seconds that this took.

    learner: a module with a list `optimizers` and the arguments as `args`; counters: plain numbers, the step first;
    logs: {name: latest loss}; replay: MATD3's. The optimisers' options, such as learning rates, are left out, since
    they follow from the arguments and the step.
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
        **identity(type(learner.args)),
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
    # write the first process's file last: it names the step that the others' files must have. Until it is complete,
    # their new files and their older ones both stay
    path = process_file(run_folder, rank, counters[0])
    failed = rank > 0 and not write(path, own)
    if not any_process(failed, device):
        failed = rank == 0 and not write(os.path.join(run_folder, "checkpoint.pt"), shared | own)
        complete = not any_process(failed, device)  # every process has to ask, rank 0 too
        if complete and rank > 0:
            for older in set(glob.glob(process_file(glob.escape(run_folder), rank, "*"))) - {path}:
                os.remove(older)
    writer.add_scalar("charts/checkpoint_seconds", time.perf_counter() - start, counters[0])


def process_file(run_folder, rank, step):
    return os.path.join(run_folder, f"checkpoint_process{rank}_{step}.pt")


def read_checkpoint(run_folder, args_class):
    """The checkpoint in a run's folder, checked: "args" are an args_class, "path" is its file.

    Fails if another script made it, and warns if the script's code has changed since. Also takes the file's own path.
    """
    if os.path.basename(run_folder) == "model.pt":
        fail(f"--resume: {run_folder} is a model, which --evaluate takes; expected a run's folder or its checkpoint.pt")
    if os.path.basename(run_folder) == "checkpoint.pt":
        run_folder = os.path.dirname(run_folder) or "."
    path = os.path.join(run_folder, "checkpoint.pt")
    with refuse_damage(f"--resume: {path}", "a checkpoint that --checkpoint-interval wrote"):
        checkpoint = read(path)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"format {checkpoint['format']} of another version of this code, not {FORMAT}")
        check_identity(checkpoint, args_class, f"--resume: {path}")
        differing = {field.name for field in dataclasses.fields(args_class)} ^ set(checkpoint["args"])
        if differing:
            raise ValueError(f"{', '.join(sorted(differing))}: flags of this script or of the run's, but not of both")
        tensors = [*checkpoint["learner"].values(), checkpoint["obs"]]
        args = check_args(checkpoint["args"], args_class, tensors, SIZES, path)
    return checkpoint | {"args": args, "path": path}


def check_resumed(args, checkpoint):
    """Return the arguments if the run can continue with them, its folder as `resume`; else fail."""
    before, step = checkpoint["args"], checkpoint["counters"][0]
    for name, old in dataclasses.asdict(before).items():
        new, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if new != old and name not in MAY_CHANGE and (name, new) != ("precision", "auto"):
            fail(f"{flag} is {new}, expected {old} beside --resume {args.resume}: the run has used it until now")
    *_, eval_due = checkpoint["counters"]  # True: a signal ended the evaluation at this step early
    if args.total_timesteps <= step and not (eval_due and args.total_timesteps == before.total_timesteps):
        expected = f"more than the {step} steps that the run in {args.resume} has made"
        fail(f"--total-timesteps is {args.total_timesteps}, expected {expected}")
    if args.total_timesteps != before.total_timesteps:
        what = "resets and falling learning rates follow the new one from now on"
        print(f"--total-timesteps is {args.total_timesteps} and was {before.total_timesteps}: {what}")
    args.resume = os.path.dirname(checkpoint["path"])
    return args


def restore_checkpoint(checkpoint, learner, envs, replay=None):
    """Put learner, environments, generators and replay back to where they were. Empties `checkpoint`.

    Returns obs, counters and logs, as write_checkpoint got them. Fails if --precision auto means another one here.
    """
    device, (rank, processes) = next(learner.parameters()).device, rank_and_size()
    path, expected = checkpoint["path"], "a whole checkpoint of this script"
    if processes != checkpoint["processes"]:
        fail(f"--resume: {path} is of {checkpoint['processes']} processes, expected as many, not {processes}")
    here, before = (getattr(args, "precision", None) for args in (learner.args, checkpoint["args"]))
    require(here == before, f"--precision auto is {here} here, expected {before}, the precision of {path}")
    if rank > 0:
        path = process_file(os.path.dirname(path), rank, checkpoint["counters"][0])
        with refuse_damage(f"--resume: {path}", expected):
            checkpoint |= read(path)
    with refuse_damage(f"--resume: {path}", expected):
        learner.load_state_dict(checkpoint["learner"])
        # copies, for nothing to point into the file, which the next checkpoint replaces
        for optimizer, state in zip(learner.optimizers, copy.deepcopy(checkpoint["optimizers"]), strict=True):
            # options such as capturable belong to this device
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        state = checkpoint["envs"].items()
        envs.set_state({name: x.numpy().copy() if isinstance(x, torch.Tensor) else x for name, x in state})
        if replay is not None:
            unpack_replay(replay, checkpoint["replay"])
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if device.type == "cuda" and "cuda" in checkpoint["random"]:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], device)
        logs = {name: value.to(device, copy=True) for name, value in checkpoint["logs"].items()}
        obs, counters = checkpoint["obs"].numpy().copy(), checkpoint["counters"]
    checkpoint.clear()
    return obs, counters, logs


# ---- The replay buffer ----
def pack_replay(replay):
    """Views of the filled rows, and a copy of the next states that the following row does not hold."""
    filled = int(replay.filled)
    saved = {name: filled_rows(getattr(replay, name), filled) for name in REPLAY_ARRAYS}
    chunk = max(2**22 // replay.state[0].numel(), 1)  # rows of 16 MB
    pairs = zip(torch.arange(filled).split(chunk), replay.next_state[:filled].split(chunk), strict=True)
    known = torch.cat([(after == replay.state[(row + 1) % replay.rows]).all(-1) for row, after in pairs])
    saved |= {"known": known, "next_state": replay.next_state[:filled][~known]}
    return saved | {"newest": int(replay.newest), "rows": replay.rows}


def filled_rows(array, filled):
    """array[:filled], a view that torch.save writes alone; of other views, it writes all the memory behind them."""
    rows = array[:filled]
    storage = rows.untyped_storage()[: rows.nbytes]
    return torch.empty(0, dtype=rows.dtype, device=rows.device).set_(storage, 0, rows.shape, rows.stride())


def unpack_replay(replay, saved):
    """Store what pack_replay returned, in the same rows of a ring that has at least as many as are filled."""
    filled, known = len(saved["state"]), saved["known"]
    for name in REPLAY_ARRAYS:
        getattr(replay, name)[:filled] = saved[name]
    replay.next_state[: filled - 1] = replay.state[1:filled]
    replay.next_state[filled - 1] = replay.state[filled % saved["rows"]]
    replay.next_state[:filled][known.logical_not()] = saved["next_state"].to(replay.state.device)
    replay.next_row = (saved["newest"] + 1) % replay.rows
    replay.newest.fill_(saved["newest"])
    replay.filled.fill_(filled)
