"""What surrounds an algorithm, and is the same for each: command line, run folder, evaluation, saved models.

Mistakes of the user end in `fail`: one line on stderr that names the value and what was expected, and exit code 2.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import sys
import time

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

from mamujoco_env import MaMuJoCoVecEnv, parse_env_id


# ---- Command line ----
def fail(message):
    """End with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_command_line(args_class, argv=None):
    """An `args_class`, a dataclass whose docstrings are the help, from argv or the command line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(args_class, args=argv)
    except SystemExit as stop:
        if stop.code:  # take tyro's message out of its box, and leave out the box's title and rules
            lines = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", complaint.getvalue()).splitlines()
            fail(" ".join(" ".join(line for line in lines if "──" not in line and "─ " not in line).split()))
        raise


def require(args, names, condition, expected):
    """Fail if one of the arguments (names with spaces between) does not meet the condition."""
    for name in names.split():
        value = getattr(args, name)
        if not condition(value):
            fail(f"--{name.replace('_', '-')} is {value}, expected {expected}")


def require_count(args, names, least=1):
    require(args, names, lambda x: x >= least, f"at least {least}")


def require_share(args, names):
    require(args, names, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def require_size(args, names):
    require(args, names, lambda x: 0 <= x < math.inf, "a finite number of at least 0")


def check_common_args(args):
    """Refuse what cannot work among the flags that all scripts have."""
    require_count(args, "total_timesteps num_envs episode_limit log_interval")
    require_count(args, "num_threads eval_interval eval_episodes", least=0)
    if args.evaluate is not None:
        require(args, "eval_episodes", lambda x: x >= 1, "at least 1 with --evaluate")
    require(args, "seed", lambda x: 0 <= x < 2**63, "an integer from 0 to 2^63 - 1")
    require(args, "exp_name", lambda x: re.fullmatch(r"[\w.+-]+", x), "letters, digits and any of _ . + -")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device is cuda, expected cpu or auto: PyTorch finds no CUDA device here")
    try:
        parse_env_id(args.env_id)
    except ValueError as error:
        fail(f"--env-id: {error}")

    require_count(args, "hidden_size num_critics history_length")
    require_count(args, "actor_reset_interval critic_reset_interval", least=0)
    require_share(args, "gamma actor_reset_ratio")
    require_size(args, "actor_threshold_scale critic_threshold_scale actor_diversity_coef critic_diversity_coef")
    require(args, "actor_threshold_bias critic_threshold_bias", math.isfinite, "a finite number")
    require(args, "layer_weights", lambda x: all(0 <= w < math.inf for w in x), "finite numbers of at least 0")


def choose_device(args):
    """torch.device of --device."""
    return torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


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


def open_log(run_folder, args):
    """TensorBoard's SummaryWriter for a run, with the arguments as a table."""
    writer = SummaryWriter(run_folder)
    rows = "\n".join(f"|{name}|{value}|" for name, value in dataclasses.asdict(args).items())
    writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}")
    return writer


# ---- Evaluation, saved models ----
def make_eval_envs(args, num_threads):
    """(environments, seed) for --eval-episodes episodes, which start from states of their own."""
    seed = args.seed + 1_000_000
    return MaMuJoCoVecEnv(args.env_id, args.eval_episodes, seed, num_threads, args.episode_limit), seed


@torch.no_grad()
def evaluate(actor, envs, seed):
    """Run one episode in every environment with deterministic actions: returns (E,), lengths (E,).

    Waiting for every environment's first episode, and for no other, counts long and short episodes alike.
    """
    layers, device = actor.effective_layers(), actor.low.device
    returns, lengths, finished = np.zeros(envs.num_envs), np.zeros(envs.num_envs), np.zeros(envs.num_envs, bool)
    obs, _ = envs.reset(seed=seed)
    while not finished.all():
        actions = actor.act(torch.as_tensor(obs, device=device), layers)
        obs, _, _, _, infos = envs.step(actions.cpu().numpy())
        if "episode" in infos:
            first = infos["_episode"] & ~finished
            returns[first], lengths[first] = infos["episode"]["r"][first], infos["episode"]["l"][first]
            finished |= first
    return returns, lengths


def save_model(path, learner, global_step):
    """Write actor, critic and arguments; a reader never sees half a file."""
    model = {"actor": learner.actor.state_dict(), "critic": learner.critic.state_dict()}
    model |= {"args": dataclasses.asdict(learner.args), "global_step": global_step}
    torch.save(model, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_actor(path, env_id, device, actor_class, args_class):
    """The actor of a file that save_model wrote and the arguments it was trained with: (actor, args)."""
    try:
        model = torch.load(path, map_location=device, weights_only=True)
        args, state = args_class(**model["args"]), model["actor"]
        bounds = (state["low"].cpu().numpy(), state["high"].cpu().numpy())
        actor = actor_class(state["layers.0.thresholds"].shape[-1], *bounds, args)
        actor.load_state_dict(state)
    except OSError as error:
        fail(f"--evaluate {path}: {error.strerror or error}, expected a file that --save-model wrote")
    except Exception as error:  # what a damaged or foreign file raises depends on where it breaks
        reason = str(error).split("\n")[0]
        fail(f"--evaluate {path}: not a model that --save-model wrote ({type(error).__name__}: {reason})")
    if env_id not in (args_class.env_id, args.env_id):
        fail(f"--env-id {env_id}: the model in {path} was trained on {args.env_id}")
    return actor.to(device), args


def evaluate_file(args, device, actor_class):
    """What --evaluate does: print mean and standard deviation of the return of a saved model."""
    actor, trained = load_actor(args.evaluate, args.env_id, device, actor_class, type(args))
    trained.eval_episodes, trained.seed = args.eval_episodes, args.seed
    returns, lengths = evaluate(actor, *make_eval_envs(trained, args.num_threads))
    result = f"return {returns.mean():.1f} +- {returns.std():.1f} (std), length {lengths.mean():.0f}"
    print(f"{trained.env_id}: {result}, {len(returns)} episodes")
