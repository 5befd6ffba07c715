"""What surrounds an algorithm, and is the same for each: command line, run folder, evaluation, checkpoints, signals.

Mistakes of the user end in `fail`: one line on stderr that names the value and what was expected, and exit code 2.

A checkpoint holds all that the rest of a run depends on: where it is resumed on the same CPU, the run goes on bit for
bit as if it had never stopped. It is one file, RUN_FOLDER/checkpoint.pt, of tensors and plain values (no code: it loads
with weights_only=True), written beside the previous one and then put in its place in one step.
"""

import contextlib
import ctypes
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import io
import math
import os
import re
import shutil
import signal
import struct
import sys
import time
from typing import Literal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import filming
from cuda_graphs import compiler_for
from mamujoco_env import MaMuJoCoVecEnv, parse_env_id
from mask_pictures import log_masks

DEFAULT_ENV_ID = "Ant-v2-4x2"
CHECKPOINT_FORMAT = 2
DIGEST = "sha256"
# what --resume lets a user change, since none of it changes what the run has learnt so far
RESUME_MAY_CHANGE = "resume total_timesteps device num_threads log_interval eval_interval eval_episodes save_model"
RESUME_MAY_CHANGE += " checkpoint_interval checkpoint_buffer cudagraph compile capture_video track wandb_project"
RESUME_MAY_CHANGE += " wandb_entity"


# ---- Command line ----
@dataclasses.dataclass
class RunArgs:
    """The flags that do not touch the algorithm, and are the same for each."""

    # run
    exp_name: str = ""
    """name of this experiment, part of the run's folder"""
    seed: int = 1
    """seed of the weights, the exploration, the minibatches and the environments"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks, stored transitions and updates live; auto takes the GPU if there is one"""
    cudagraph: bool = True
    """on a GPU, launch a whole update at once, as a CUDA graph, and not kernel by kernel"""
    compile: bool = False
    """let torch.compile fuse the updates' kernels, which takes minutes at the start"""
    total_timesteps: int = 10_000_000
    """environment steps of the run, over all environments"""
    log_interval: int = 5_000
    """environment steps between two entries of losses, coefficients and masks in TensorBoard"""
    eval_interval: int = 100_000
    """environment steps between two evaluations; 0 evaluates at the end only"""
    eval_episodes: int = 40
    """episodes of an evaluation, one in each of as many environments; 0 turns evaluation off"""
    save_model: bool = False
    """write actor and critic to model.pt in the run's folder, at every evaluation and at the end"""
    checkpoint_interval: int = 0
    """environment steps between two checkpoints, from which --resume goes on exactly; 0 writes none"""
    resume: str | None = None
    """go on with the run in this folder, with its arguments; a new --total-timesteps moves the end of schedules"""
    evaluate: str | None = None
    """do not train: evaluate the model in this file for --eval-episodes episodes, on the task it was trained on"""
    render: bool = False
    """with --evaluate: show the first of the episodes in a window"""
    capture_video: bool = False
    """film the first episode of each evaluation: a GIF in the run's folder (with --evaluate: beside the model)"""
    track: bool = False
    """log to Weights & Biases as well, which then must be installed"""
    wandb_project: str = "kaleidoscope-mamujoco"
    """Weights & Biases' project"""
    wandb_entity: str | None = None
    """Weights & Biases' user or team"""

    # environment
    env_id: str | None = None
    """a robot and its division into agents, such as Walker2d-v2-6x1, Ant-v5-4x2 or manyagent_swimmer-10x2; without it,
    Ant-v2-4x2 or, with --evaluate, the model's"""
    agent_obsk: int | None = None
    """agents observe their own joints and those at up to so many steps in the joint graph; by default the full state"""
    num_threads: int = 0
    """threads for the physics, 0 for one per CPU"""
    episode_limit: int = 1_000
    """steps after which an episode is cut; a cut is not a termination"""


def fail(message):
    """End with one line on stderr and exit code 2."""
    say(f"error: {' '.join(str(message).split())}")
    sys.exit(2)


def say(line):
    """A line on stderr, above the progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def read_flags(args_class, argv, default):
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(args_class, args=argv, default=default)
    except SystemExit as stop:
        if stop.code:  # take tyro's message out of its box, and leave out the box's title and rules
            lines = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", complaint.getvalue()).splitlines()
            fail(" ".join(line for line in lines if "──" not in line and "─ " not in line))
        raise


def read_command_line(args_class, argv=None):
    """(args, checkpoint) from argv or the command line: an `args_class`, a dataclass whose docstrings are the help.

    With --resume, the arguments are those of the run, and the checkpoint is what read_checkpoint returns, else None.
    """
    args = read_flags(args_class, argv, default=args_class())
    if args.resume is None:
        if args.env_id is None and args.evaluate is None:
            args.env_id = DEFAULT_ENV_ID
        return args, None
    checkpoint = read_checkpoint(args.resume, args_class)
    before = checkpoint["args"]
    args = read_flags(args_class, argv, default=before)
    require(args, "evaluate", lambda x: x is None, "nothing, or no --resume beside it")
    for field in dataclasses.fields(args):
        old, new = getattr(before, field.name), getattr(args, field.name)
        if old != new and field.name not in RESUME_MAY_CHANGE.split():
            flag = field.name.replace("_", "-")
            fail(f"--{flag} is {new}, expected {old}, with which the run in {args.resume} has learnt so far")
    step = checkpoint["counters"]["global_step"]
    expected = f"more than the {step} steps that the run in {args.resume} has made"
    require(args, "total_timesteps", lambda x: x > step, expected)
    if args.total_timesteps != before.total_timesteps:
        what = "resets and falling learning rates follow the new one from here on"
        print(f"--total-timesteps is {args.total_timesteps} and was {before.total_timesteps}: {what}")
    return args, checkpoint


def require(args, names, condition, expected):
    """Fail if one of the arguments (names with spaces between) does not meet the condition."""
    for name in names.split():
        value = getattr(args, name)
        if not condition(value):
            fail(f"--{name.replace('_', '-')} is {value}, expected {expected}")


def require_count(args, names, least=1):
    require(args, names, lambda x: least <= x < 2**31, f"an integer from {least} to 2^31 - 1")


def require_share(args, names):
    require(args, names, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def require_size(args, names):
    require(args, names, lambda x: 0 <= x <= 1e30, "a number from 0 to 1e30")


def check_common_args(args):
    """Refuse what cannot work among the flags that all scripts have."""
    require_count(args, "total_timesteps num_envs episode_limit log_interval")
    require_count(args, "num_threads eval_interval eval_episodes checkpoint_interval", least=0)
    if args.evaluate is not None:
        require(args, "eval_episodes", lambda x: x >= 1, "at least 1 with --evaluate")
    require(args, "seed", lambda x: 0 <= x < 2**32, "an integer from 0 to 2^32 - 1")  # PyTorch keeps 32 bits of it
    require(args, "exp_name", lambda x: re.fullmatch(r"[\w.+-]+", x), "letters, digits and any of _ . + -")
    require(args, "agent_obsk", lambda x: x is None or 0 <= x < 2**31, "an integer from 0 to 2^31 - 1")
    require(args, "capture_video", lambda x: not x or args.eval_episodes >= 1, "--eval-episodes above 0 beside it")
    require(args, "render", lambda x: not x or args.evaluate is not None, "it only with --evaluate")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track is set, expected Weights & Biases to be installed (pip install wandb)")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device is cuda, expected cpu or auto: PyTorch finds no CUDA device here")
    found, compiler = compiler_for(device_type(args))
    require(args, "compile", lambda x: not x or found, f"it only where there is {compiler}")
    try:
        parse_env_id(DEFAULT_ENV_ID if args.env_id is None else args.env_id)
    except ValueError as error:
        fail(f"--env-id: {error}")

    require_count(args, "hidden_size num_critics history_length")
    require_count(args, "actor_reset_interval critic_reset_interval", least=0)
    require_share(args, "gamma actor_reset_ratio")
    require_size(args, "actor_threshold_scale critic_threshold_scale actor_diversity_coef critic_diversity_coef")
    require(args, "actor_threshold_bias critic_threshold_bias", math.isfinite, "a finite number")
    require(args, "layer_weights", lambda x: all(0 <= w < math.inf for w in x), "finite numbers of at least 0")


def device_type(args):
    """What --device means here: "cpu" or "cuda"."""
    return args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


# ---- Several processes, started by torchrun, each with environments of its own; alone, none of this does anything ----
def start(args):
    """(device, rank, number of processes): joins the others that torchrun started, if it did."""
    keep_freed_memory()
    kind = device_type(args)
    if not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        return torch.device(kind), 0, 1
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return torch.device(kind), dist.get_rank(), dist.get_world_size()


def keep_freed_memory():
    """Let glibc keep freed memory for the tensors to come, which are of the same sizes again and again.

    Without, an update spends an eighth of its time on the CPU on getting pages back from the kernel.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest value: larger ones go back to the kernel
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def seed_of_process(seed, rank):
    """The first process's is `seed`. All have 32 bits, since PyTorch's generator on the CPU keeps no more."""
    return seed if rank == 0 else int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])


def average(tensors):
    """Replace tensors by their means over the processes, in place, in one exchange."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def mean_std(x):
    """Mean and standard deviation of all entries of x in all processes, each with as many."""
    if not dist.is_initialized():
        return x.mean(), x.std(correction=0)
    mean, square = moments = torch.stack([x.mean(), x.square().mean()])
    average([moments])
    return mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def broadcast(network):
    """Give all processes the parameters of the first, where each has drawn some of its own."""
    if dist.is_initialized():
        for parameter in network.parameters():
            dist.broadcast(parameter, 0)


def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(value):
    """The first process's value in all of them."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def any_process(condition, device):
    """Whether the condition holds in one process at least."""
    if not dist.is_initialized():
        return condition
    holds = torch.tensor(float(condition), device=device)
    dist.all_reduce(holds, dist.ReduceOp.MAX)
    return holds.item() > 0


# ---- Run folder ----
def make_run_folder(args):
    """Make and return runs/{env_id}__{exp_name}__{seed}__{time}, a new folder."""
    now = int(time.time())
    while True:
        name = f"{args.env_id.replace('|', '_')}__{args.exp_name}__{args.seed}__{now}"
        try:
            os.makedirs(os.path.join("runs", name))
            return os.path.join("runs", name)
        except FileExistsError as error:
            if not os.path.isdir("runs"):
                fail(f"runs: {error.strerror}, expected a folder to write to")
            now += 1  # another run started in this second
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}, expected a folder to write to")


def claim(run_folder):
    """Refuse a folder that another process trains in. Returns what Log.close releases; so does the process's end."""
    if fcntl is None:  # Windows
        return None
    folder = os.open(run_folder, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        fail(f"{run_folder} is being trained in by another process, expected a run that has stopped")
    except OSError:  # a file system without locks
        pass
    return folder


class NoLog:
    """Stands in for Log in all processes but the first."""

    def add_scalar(self, *args, **kwargs):
        pass

    def close(self):
        pass


class Log(SummaryWriter):
    """A SummaryWriter that does not end the training where a disk is full or a folder gone: what it logs is lost."""

    opened = None  # the one of this process
    silent_until = 0.0  # on time.monotonic()

    def __init__(self, run_folder, claimed=None, **options):
        self.claimed = claimed
        self.has_learnt = "purge_step" in options  # a resumed run
        super().__init__(run_folder, **options)
        Log.opened = self

    def attempt(self, add, *args, **kwargs):
        if time.monotonic() < self.silent_until:
            return
        try:
            add(*args, **kwargs)
        except OSError as error:  # of an earlier entry, since a thread writes them
            say(f"warning: {self.log_dir}: {error.strerror or error}; training goes on, a minute of its log is lost")
            self.file_writer = self.all_writers = None  # the next entry opens a new file
            self.silent_until = time.monotonic() + 60

    def add_scalar(self, tag, *args, **kwargs):
        self.has_learnt |= tag.startswith("losses/")
        self.attempt(super().add_scalar, tag, *args, **kwargs)

    def add_image(self, *args, **kwargs):
        self.attempt(super().add_image, *args, **kwargs)

    def add_histogram(self, *args, **kwargs):
        self.attempt(super().add_histogram, *args, **kwargs)

    def add_gif(self, tag, gif, global_step):
        """TensorBoard shows the bytes of a GIF as a moving image."""
        width, height = struct.unpack("<HH", gif[6:10])
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self.attempt(lambda: self._get_file_writer().add_summary(summary, global_step))

    def close(self):
        try:
            super().close()
        except OSError as error:
            say(f"warning: {self.log_dir}: {error.strerror or error}; the latest scalars are lost")
        if self.claimed is not None:
            os.close(self.claimed)
            self.claimed = None


def open_run(args, global_step, rank=0):
    """(run folder, Log): new ones, or those of the run that is resumed at global_step.

    TensorBoard then drops what the run had logged after that step. Of several processes, the first one has the Log.
    """
    run_folder, writer = open_log(args, global_step) if rank == 0 else (None, NoLog())
    return share(run_folder), writer


def open_log(args, global_step):
    run_folder = args.resume if args.resume is not None else make_run_folder(args)
    try:
        claimed = claim(run_folder)
        if args.resume is not None:
            # TensorBoard reads a run's files in the order of their names, which begin with the second they were made in
            names = (name.split(".") for name in os.listdir(run_folder) if name.startswith("events.out.tfevents."))
            made = (int(parts[3]) for parts in names)
            time.sleep(min(max(max(made, default=0) + 1 - time.time(), 0), 1))
            start_tracking(args, run_folder)
            return run_folder, Log(run_folder, claimed, purge_step=global_step + 1)
        start_tracking(args, run_folder)
        writer = Log(run_folder, claimed)
        rows = "\n".join(f"|{name}|{value}|" for name, value in dataclasses.asdict(args).items())
        writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}")
        return run_folder, writer
    except OSError as error:
        if args.resume is None:
            shutil.rmtree(run_folder, ignore_errors=True)
        fail(f"{run_folder}: {error.strerror or error}, expected a folder to write to")


def log_episodes(writer, infos, global_step):
    """Write mean return and length of the episodes that ended in a step, if any did."""
    if "episode" in infos:
        ended, episode = infos["_episode"], infos["episode"]
        writer.add_scalar("charts/episodic_return", episode["r"][ended].mean(), global_step)
        writer.add_scalar("charts/episodic_length", episode["l"][ended].mean(), global_step)


def log_learning(writer, learner, logs, charts, global_step):
    """Write losses, scalars on the device by name, what the masks have become, and charts, plain values by name."""
    for name, value in logs.items():
        writer.add_scalar(name, value.item(), global_step)
    for name, network in (("actor", learner.actor), ("critic", learner.critic)):
        for layer, share in enumerate(network.sparsity().tolist(), start=1):
            writer.add_scalar(f"masks/{name}_sparsity_layer{layer}", share, global_step)
        writer.add_scalar(f"masks/{name}_difference", network.mask_difference().item(), global_step)
    for name, value in charts.items():
        writer.add_scalar(f"charts/{name}", value, global_step)


def start_tracking(args, run_folder):
    """With --track, let Weights & Biases take what TensorBoard is given; it must be asked before the writer is made."""
    if not args.track:
        return
    import wandb

    name = os.path.basename(os.path.normpath(run_folder))
    settings = dict(project=args.wandb_project, entity=args.wandb_entity, name=name, id=name, resume="allow")
    try:
        wandb.init(**settings, dir=run_folder, sync_tensorboard=True, save_code=True, config=dataclasses.asdict(args))
    except wandb.Error as error:
        if args.resume is None:
            shutil.rmtree(run_folder, ignore_errors=True)
        fail(f"--track: Weights & Biases says: {error}; expected a login, or WANDB_MODE=offline")


@contextlib.contextmanager
def refuse_what_does_not_fit():
    """Within it, sizes that no memory holds end in one line."""
    try:
        yield
    except (MemoryError, OverflowError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        fail(f"networks, storage and environments of these sizes cannot be made ({type(error).__name__}: {reason})")


def lacks_memory(error):
    """Whether an exception says that memory has ended, on the CPU or on a GPU."""
    known = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(what in str(error) for what in known)


def one_line_without_memory(main):
    """Decorator of a script's main: where memory ends, so does the run, with one line in the place of a traceback.

    Sizes that can be made may still be too large for the first update. Such a run has learnt nothing: its folder goes,
    and the exit code is that of a mistake. A later lack leaves what was saved, and is exit code 1.
    """

    @functools.wraps(main)
    def guarded():
        try:
            main()
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            log, reason = Log.opened, f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
            if log is not None:
                log.close()
                if log.has_learnt or glob.glob(os.path.join(glob.escape(log.log_dir), "*.pt")):
                    say(f"error: memory ended ({reason}); what was saved in {log.log_dir} stays")
                    sys.exit(1)
                shutil.rmtree(log.log_dir, ignore_errors=True)
            fail(f"memory ended before anything was learnt ({reason}), expected smaller sizes")

    return guarded


def observation_sizes(envs):
    """What agents see of the state, in words."""
    if envs.columns is None:
        return "agents see the full state"
    sizes = (envs.columns >= 0).sum(1)
    if sizes.min() == sizes.max():
        return f"agents see {sizes[0]} of {envs.state_size} numbers"
    filled = "filled up with zeros, so that weights can be shared"
    return f"agents see {sizes.min()} to {sizes.max()} of {envs.state_size} numbers, {filled}"


# ---- Evaluation, saved models ----
class Evaluation:
    """--eval-episodes episodes, one in each of as many environments, from the same starts every time."""

    def __init__(self, args):
        self.seed = args.seed + 1_000_000
        settings = (self.seed, args.num_threads, args.episode_limit, args.agent_obsk)
        self.envs = MaMuJoCoVecEnv(args.env_id, args.eval_episodes, *settings)
        self.film = self.open_eyes("capture_video", filming.Film) if args.capture_video else None
        self.window = self.open_eyes("render", filming.Window) if args.render else None

    def open_eyes(self, name, kind):
        try:
            return kind(self.envs)
        except RuntimeError as error:
            needs = "a screen" if name == "render" else "OpenGL: EGL (Debian: libegl1, libgl1), or MUJOCO_GL set"
            fail(f"--{name.replace('_', '-')}: {' '.join(str(error).split())[:200]}; expected {needs}")

    @torch.no_grad()
    def run(self, actor):
        """Deterministic actions until every environment's first episode has ended: returns (E,), lengths (E,).

        To wait for every first episode, and for no other, counts long and short ones alike.
        """
        envs, layers, device = self.envs, actor.effective_layers(), actor.low.device
        returns, lengths, finished = np.zeros(envs.num_envs), np.zeros(envs.num_envs), np.zeros(envs.num_envs, bool)
        obs, _ = envs.reset(seed=self.seed)
        while not finished.all():
            for eye in (self.film, self.window):
                if eye is not None and not finished[0]:
                    eye()
            actions = actor.act(torch.as_tensor(obs, device=device), layers)
            obs, _, _, _, infos = envs.step(actions.cpu().numpy())
            if "episode" in infos:
                first = infos["_episode"] & ~finished
                returns[first], lengths[first] = infos["episode"]["r"][first], infos["episode"]["l"][first]
                finished |= first
        return returns, lengths

    def log(self, learner, writer, run_folder, global_step):
        """Run, and write returns, film and pictures of the masks to TensorBoard. Returns the result as a text."""
        returns, lengths = self.run(learner.actor)
        for name, value in (("return", returns.mean()), ("return_std", returns.std()), ("length", lengths.mean())):
            writer.add_scalar(f"charts/eval_{name}", value, global_step)
        for name, network in (("actor", learner.actor), ("critic", learner.critic)):
            log_masks(writer, name, network, global_step)
        if self.film is not None:
            gif = self.film.take()
            writer.add_gif("videos/evaluation", gif, global_step)
            write_bytes(os.path.join(run_folder, f"evaluation_{global_step}.gif"), gif)
        return f"{returns.mean():.1f}+-{returns.std():.1f}"


def save_model(path, learner, global_step):
    """Write actor, critic and arguments for --evaluate."""
    model = {"actor": learner.actor.state_dict(), "critic": learner.critic.state_dict()}
    write(path, model | {"args": dataclasses.asdict(learner.args), "global_step": global_step})


def load_actor(path, env_id, device, actor_class, args_class):
    """The actor of a file that save_model wrote and the arguments it was trained with: (actor, args)."""
    try:
        model = read(path, device)
        args, state = args_class(**model["args"]), model["actor"]
        bounds = (state["low"].cpu().numpy(), state["high"].cpu().numpy())
        actor = actor_class(state["layers.0.thresholds"].shape[-1], *bounds, args)
        actor.load_state_dict(state)
    except OSError as error:
        fail(f"--evaluate {path}: {error.strerror or error}, expected a file that --save-model wrote")
    except Exception as error:  # what a damaged or foreign file raises depends on where it breaks
        reason = str(error).split("\n")[0]
        fail(f"--evaluate {path}: not a model that --save-model wrote ({type(error).__name__}: {reason})")
    if env_id not in (None, args.env_id):
        fail(f"--env-id {env_id}: the model in {path} was trained on {args.env_id}")
    return actor.to(device), args


def evaluate_file(args, device, actor_class):
    """What --evaluate does: print mean and standard deviation of the return of a saved model."""
    actor, trained = load_actor(args.evaluate, args.env_id, device, actor_class, type(args))
    for name in ("eval_episodes", "seed", "num_threads", "capture_video", "render"):
        setattr(trained, name, getattr(args, name))
    evaluation = Evaluation(trained)
    returns, lengths = evaluation.run(actor)
    result = f"return {returns.mean():.1f} +- {returns.std():.1f} (std), length {lengths.mean():.0f}"
    print(f"{trained.env_id}: {result}, {len(returns)} episodes")
    if evaluation.film is not None:
        path = os.path.splitext(args.evaluate)[0] + ".gif"
        if write_bytes(path, evaluation.film.take()):
            print(path)
    if evaluation.window is not None:
        evaluation.window.close()


# ---- Checkpoints ----
def write(path, content):
    """Save so that `path` holds the old content or the new, whole, whatever happens. Returns whether it holds the new.

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
        say(f"warning: {path}: {reason}; training goes on, and what was there before stays")
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        return False
    return True


def read(path, device):
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


def write_bytes(path, content):
    """Write a file. What goes wrong is reported on stderr. Returns whether it was written."""
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        say(f"warning: {path}: {error.strerror or error}; it was not written")
        return False
    return True


def as_tensors(tree):
    """The same tree of dicts and lists with tensors in the place of NumPy's arrays and scalars."""
    if isinstance(tree, dict):
        return {key: as_tensors(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [as_tensors(value) for value in tree]
    return torch.as_tensor(tree) if isinstance(tree, (np.ndarray, np.generic)) else tree


def as_arrays(tree):
    """The same tree with NumPy's arrays in the place of tensors."""
    if isinstance(tree, dict):
        return {key: as_arrays(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [as_arrays(value) for value in tree]
    return tree.numpy() if isinstance(tree, torch.Tensor) else tree


def write_checkpoint(run_folder, learner, envs, obs, counters, logs=None, replay=None):
    """Write all that the rest of the run depends on. Returns the seconds it took.

    learner: a module with a list `optimizers` and the arguments as `args`; counters: plain values by name, global_step
    among them; logs: the latest losses by name; replay: has state_dict, or None to leave it out.
    """
    start = time.perf_counter()
    random, device = {"cpu": torch.get_rng_state()}, next(learner.parameters()).device
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    rank, processes = rank_and_size()
    of_all = {
        "format": CHECKPOINT_FORMAT,
        "processes": processes,
        "args": dataclasses.asdict(learner.args),
        "learner": learner.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers],
        "counters": counters,
        "logs": logs,
    }
    own = {
        "envs": as_tensors(envs.get_state()),
        "obs": torch.as_tensor(obs),
        "random": random,
        "replay": None if replay is None else replay.state_dict(),
    }
    # each process has its own file, and the first one's comes last: it says from which step the others' have to be,
    # so that these, and their older ones, stay until it is whole
    path = process_file(run_folder, rank, counters["global_step"])
    written = rank == 0 or write(path, own)
    if not any_process(not written, device):
        written = rank > 0 or write(os.path.join(run_folder, "checkpoint.pt"), of_all | own)
        if not any_process(not written, device) and rank > 0:
            remove_older(path)
    return time.perf_counter() - start


def process_file(run_folder, rank, step):
    return os.path.join(run_folder, f"checkpoint_process{rank}_{step}.pt")


def remove_older(path):
    """Remove the files of a process beside its latest one."""
    folder, latest = os.path.split(path)
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name != latest and name.startswith(latest.rpartition("_")[0] + "_"):
                os.remove(os.path.join(folder, name))


@contextlib.contextmanager
def refuse_damage(path):
    """Within it, whatever a damaged or foreign checkpoint raises ends in one line: that depends on where it breaks."""
    try:
        yield
    except OSError as error:
        fail(f"--resume: {path}: {error.strerror or error}, expected a checkpoint that --checkpoint-interval wrote")
    except Exception as error:
        reason = str(error).split("\n")[0]
        fail(f"--resume: {path}: not a whole checkpoint of this script ({type(error).__name__}: {reason})")


def read_checkpoint(run_folder, args_class):
    """What write_checkpoint wrote, checked, with its arguments as an args_class and its path as "path"."""
    path = os.path.join(run_folder, "checkpoint.pt")
    if not os.path.isdir(run_folder):
        fail(f"--resume: {path}: {run_folder!r} is not a folder, expected that of a run")
    with refuse_damage(path):
        checkpoint = read(path, "cpu")
        version = checkpoint["format"]
        if version != CHECKPOINT_FORMAT:
            raise ValueError(f"format {version}, expected {CHECKPOINT_FORMAT}; written by another version of this code")
        missing = {field.name for field in dataclasses.fields(args_class)} - set(checkpoint["args"])
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))} among its arguments; written by another version")
        checkpoint["args"] = args_class(**checkpoint["args"])
        checkpoint["path"] = path
        checkpoint["counters"]["global_step"], checkpoint["processes"]
    return checkpoint


def keep_options(saved_groups, options):
    """The groups of an optimiser's saved state, with the options of the present one but for the learning rates."""
    kept = ("params", "lr")
    return [own | {name: saved[name] for name in kept} for saved, own in zip(saved_groups, options, strict=True)]


def restore(checkpoint, learner, envs, counters, replay=None):
    """Put learner, environments, generators and, where it was kept, replay back where they were.

    Returns obs, the counters of the names given, as a list, and logs.
    """
    device, (rank, processes) = next(learner.parameters()).device, rank_and_size()
    path, step = checkpoint["path"], checkpoint["counters"]["global_step"]
    if processes != checkpoint["processes"]:
        fail(f"--resume: {path} is of {checkpoint['processes']} processes, expected as many, not {processes}")
    if rank > 0:
        path = process_file(os.path.dirname(path), rank, step)
        with refuse_damage(path):
            checkpoint |= read(path, "cpu")
    with refuse_damage(path):
        learner.load_state_dict(checkpoint["learner"])
        for optimizer, state in zip(learner.optimizers, checkpoint["optimizers"], strict=True):
            # of the options, learning rates alone are the run's: the others belong to the device, as capturable does
            options = [dict(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(state | {"param_groups": keep_options(state["param_groups"], options)})
            for group, own in zip(optimizer.param_groups, options, strict=True):
                if isinstance(
                    own["lr"], torch.Tensor
                ):  # which a CUDA graph may read, so that it must stay the same one
                    group["lr"] = own["lr"].copy_(group["lr"])
        envs.set_state(as_arrays(checkpoint["envs"]))
        if replay is not None and checkpoint["replay"] is not None:
            replay.load_state_dict(checkpoint["replay"])
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if device.type == "cuda" and "cuda" in checkpoint["random"]:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], device)
        logs = {name: value.to(device) for name, value in (checkpoint["logs"] or {}).items()}
        return checkpoint["obs"].numpy(), [checkpoint["counters"][name] for name in counters.split()], logs


# ---- Stopping ----
class StopSignals:
    """Remembers the first SIGINT or SIGTERM in `received`, for the loop to end its block; a second one ends at once."""

    def __init__(self):
        self.received = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        say(f"warning: {signal.Signals(number).name}: stopping after this block; a second signal stops at once")

    def exit(self):
        """End with the exit code of the signal, 130 or 143; that of another process counts as SIGTERM."""
        sys.exit(128 + (self.received or signal.SIGTERM))


def end_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def stop_if_diverged(learner, logs, num_updates, writer):
    """End with exit code 1 and a line that names what is not finite: a loss, else a parameter."""
    values = {name: value for name, value in logs.items()} | dict(learner.named_parameters())
    finite = torch.stack([torch.isfinite(value).all() for value in values.values()]).tolist()
    if all(finite):
        return
    writer.close()
    name, value = list(values.items())[finite.index(False)]
    what = f"{name} is {value.item()}" if value.dim() == 0 else f"{name} has values that are not finite"
    say(f"error: diverged: {what} at update {num_updates}; nothing was saved after it")
    sys.exit(1)
