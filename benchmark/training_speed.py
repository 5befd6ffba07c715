"""How fast do the scripts train here, and where does the time go? Prints one table.

    python benchmark/training_speed.py
    python benchmark/training_speed.py --scripts mappo --sharing kaleidoscope full none
    python benchmark/training_speed.py --modes eager compiled
    python benchmark/training_speed.py --profile
    python benchmark/training_speed.py --scripts matd3 --num-critics 2  # the scripts get the flags it does not know

Each line is a run of a script, with the tuned values of the env id and without logging and evaluation. Its rounds are
those of the script's main loop. MATD3: --train-interval steps of all environments, then --updates-per-round updates.
MAPPO: a rollout and all its updates. All runs make round 1, then all make round 2, and so on, so that they meet the
same conditions. The columns are medians over the timed rounds: environment steps a second; milliseconds an update;
hours for 10,000,000 steps at this speed; environment steps a second of the physics alone; and the shares of acting
(networks), physics, copying (actions to the host, transitions to the device) and updates.
"""

import dataclasses
import functools
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch is imported, as in the scripts

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kalei_mappo_mamujoco as mappo  # noqa: E402
import kalei_matd3_mamujoco as matd3  # noqa: E402
from experiment.hardware import keep_freed_memory  # noqa: E402
from mamujoco_env import usable_cpus  # noqa: E402

PARTS = ("acting", "physics", "copying", "updates")


@dataclasses.dataclass
class Options:
    env_id: str = "Ant-v2-4x2"
    """task to train on, with its tuned values"""
    scripts: tuple[Literal["matd3", "mappo"], ...] = ("matd3", "mappo")
    """scripts to measure"""
    sharing: tuple[Literal["kaleidoscope", "full", "none"], ...] = ("kaleidoscope",)
    """ways of sharing to measure"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device of networks, storage and updates; auto: the GPU if there is one"""
    threads: int = usable_cpus()
    """threads for the matrix products, and for the physics"""
    modes: tuple[Literal["eager", "graph", "compiled", "compiled graph"], ...] = ()
    """graph: with --cudagraph; compiled: with --compile; eager: neither. Default: eager, and with a GPU also graph"""
    rounds: int = 5
    """timed rounds of each run"""
    warmup_rounds: int = 4
    """untimed rounds before the timed ones; the fourth call of an update, in MAPPO the fourth round, records a graph"""
    profile: bool = False
    """also print, for each run, where one more round of updates spends its time, by operator"""


class Run:
    """A training run with a stopwatch instead of logs."""

    def __init__(self, script, sharing, mode, options, flags):
        self.args, _ = script.parse_args(["--env-id", options.env_id, "--sharing", sharing, *flags])
        args, self.threads = self.args, options.threads
        self.device = torch.device("cuda" if on_gpu(options) else "cpu")
        args.num_threads = options.threads
        self.envs = script.make_env(args, args.seed, args.num_envs)
        self.space = self.envs.single_action_space
        self.learner = script.Learner(
            self.envs.state_size, self.space.low, self.space.high, args, self.device, self.envs.columns
        )
        self.make_storage()
        options = dict(device=self.device, cudagraph="graph" in mode, compile="compiled" in mode)
        self.launch = functools.partial(script.GraphedUpdate, **options)
        self.make_updates()
        self.obs, infos = self.envs.reset()
        self.state = infos["state"]
        self.seconds = []  # one dict per timed round: {part: seconds}

    def lap(self, part):
        """Add the time since the last call to `part`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.spent[part] += now - self.last
        self.last = now

    def act(self):
        block = []
        for _ in range(self.steps):
            with torch.no_grad():
                actions, bounded = self.sample(torch.as_tensor(self.obs, device=self.device))
            self.lap("acting")
            actions, on_host = actions.cpu().numpy(), bounded.cpu().numpy()
            self.lap("copying")
            self.obs, reward, terminated, truncated, infos = self.envs.step(on_host)
            self.lap("physics")
            block.append((self.state, actions, reward, infos["final_state"], terminated, truncated))
            self.state = infos["state"]
        return block

    def round(self, timed):
        start = self.last = time.perf_counter()
        self.spent = dict.fromkeys(PARTS, 0.0)
        with torch.no_grad():
            self.policy = self.keep_policy(self.learner.actor)
        self.store(self.act())
        self.lap("copying")
        torch.set_num_threads(self.threads)
        self.update()
        self.lap("updates")
        if timed:
            self.seconds.append(self.spent | {"whole": time.perf_counter() - start})


class Matd3(Run):
    def make_storage(self):
        args = self.args
        self.steps, self.num_updates = args.train_interval, args.updates_per_round
        rows = 2 * args.batch_size
        sizes = (self.envs.state_size, self.space.shape, args.n_step, args.gamma)
        self.replay = matd3.Replay(rows, args.num_envs, *sizes, self.device, self.envs.columns)
        state = self.envs.reset()[1]["state"]
        for _ in range(rows):  # real physics, random actions
            actions = self.envs.action_space.sample()
            _, reward, terminated, truncated, infos = self.envs.step(actions)
            self.replay.add([(state, actions, reward, infos["final_state"], terminated, truncated)])
            state = infos["state"]

    def make_updates(self):
        def update(with_policy):
            return self.learner.update(self.replay.sample(self.args.batch_size), with_policy)

        self.updates = [self.launch(functools.partial(update, with_policy)) for with_policy in (False, True)]

    def keep_policy(self, actor):
        return actor.effective_layers()

    def sample(self, obs):
        actor = self.learner.actor
        actions = actor.act(obs, self.policy)
        noise = torch.randn_like(actions) * actor.scale * self.args.exploration_noise
        actions = torch.clamp(actions + noise, actor.low, actor.high)
        return actions, actions

    def store(self, block):
        self.replay.add(block)

    def update(self):
        for number in range(1, self.num_updates + 1):
            self.updates[number % self.args.policy_freq == 0]()


class Mappo(Run):
    def make_storage(self):
        args = self.args
        self.steps, self.num_updates = args.rollout_steps, args.num_epochs * args.num_minibatches
        sizes = (self.envs.state_size, self.space.shape)
        self.rollout = mappo.Rollout(args.rollout_steps, args.num_envs, *sizes, self.device)

    def make_updates(self):
        self.update = self.launch(lambda: self.learner.update(self.rollout))

    def keep_policy(self, actor):
        torch.set_num_threads(1)  # until the updates
        return actor.effective_layers(), actor.std()

    def sample(self, obs):
        actions = self.learner.actor.sample(obs, *self.policy)
        return actions, self.learner.actor.to_bounds(actions)

    def store(self, block):
        self.rollout.store(block)


def on_gpu(options):
    return options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())


def machine(options):
    device = torch.cuda.get_device_name() if on_gpu(options) else "no GPU"
    cpu = platform.processor() or platform.machine()
    return f"{device}, {cpu} with {usable_cpus()} cores, {options.threads} threads, torch {torch.__version__}"


def main():
    options, flags = tyro.cli(Options, return_unknown_args=True)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(1)
    kinds = {"matd3": (Matd3, matd3), "mappo": (Mappo, mappo)}
    modes = options.modes or (("eager", "graph") if on_gpu(options) else ("eager",))
    runs = {}
    for script in options.scripts:
        for sharing in options.sharing:
            for mode in modes:
                kind, module = kinds[script]
                runs[script, sharing, mode] = kind(module, sharing, mode, options, flags)
    for number in range(options.warmup_rounds + options.rounds):
        for run in runs.values():
            run.round(timed=number >= options.warmup_rounds)

    print(f"{options.env_id}, flags {' '.join(flags) or 'as they are'}; {machine(options)}\n")
    head = ["script, sharing, mode", "steps/s", "ms/update", "10,000,000 steps, hours", "physics, steps/s", *PARTS]
    print("|", " | ".join(head), "|")
    print("| --- " * 9 + "|")
    for name, run in runs.items():
        rate = run.steps * run.args.num_envs / statistics.median(spent["whole"] for spent in run.seconds)
        parts = [statistics.median(spent[part] for spent in run.seconds) for part in PARTS]
        row = [", ".join(name), f"{rate:,.0f}", f"{parts[-1] / run.num_updates * 1000:.2f}", f"{1e7 / rate / 3600:.1f}"]
        row += [f"{run.steps * run.args.num_envs / parts[1]:,.0f}", *[f"{part / sum(parts):.1%}" for part in parts]]
        print("|", " | ".join(row), "|")
    for name, run in runs.items():
        if options.profile:
            with torch.profiler.profile() as profile:
                run.update()
            shares = profile.key_averages().table("self_cpu_time_total", row_limit=25, max_name_column_width=50)
            print(f"\n{', '.join(name)}: {run.num_updates} updates\n{shares}")
        run.envs.close()


if __name__ == "__main__":
    main()
