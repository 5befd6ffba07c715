"""Where the time of training goes, for both scripts, on whatever device there is: one table.

    python benchmark/training_speed.py
    python benchmark/training_speed.py --scripts mappo --sharing kaleidoscope full none
    python benchmark/training_speed.py --scripts matd3 --num-critics 2  # flags that are not its own go to the scripts

Each line is a run of a script: its rounds (MATD3: acting for --train-interval steps of all environments, then
--updates-per-round updates; MAPPO: a rollout and all its updates) are made as in the script's main loop, without
logging and evaluation, with values tuned for the env id. The runs take turns, round by round, so that they meet the
same conditions. Printed are medians over the timed rounds: environment steps a second; milliseconds an update; the time
that 10,000,000 steps would take at that pace, without evaluation; and the shares of acting (networks), physics, copying
(actions to the host, transitions to the device) and updates.
"""

import dataclasses
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kalei_mappo_mamujoco as mappo  # noqa: E402
import kalei_matd3_mamujoco as matd3  # noqa: E402
from mamujoco_env import MaMuJoCoVecEnv  # noqa: E402

PARTS = ("acting", "physics", "copying", "updates")


@dataclasses.dataclass
class Options:
    env_id: str = "Ant-v2-4x2"
    """task whose sizes and tuned values are used"""
    scripts: tuple[Literal["matd3", "mappo"], ...] = ("matd3", "mappo")
    """which scripts to measure"""
    sharing: tuple[Literal["kaleidoscope", "full", "none"], ...] = ("kaleidoscope",)
    """which ways of sharing to measure"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks, storage and updates live; auto takes the GPU if there is one"""
    threads: int = os.cpu_count()
    """threads for the products and for the physics"""
    rounds: int = 5
    """timed rounds of each run"""
    warmup_rounds: int = 1
    """rounds before these, not timed"""


class Run:
    """A training run with a stopwatch in the place of logs."""

    def __init__(self, script, sharing, options, flags):
        self.args, _ = script.parse_args(["--env-id", options.env_id, "--sharing", sharing, *flags])
        args, self.threads = self.args, options.threads
        cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.envs = MaMuJoCoVecEnv(
            args.env_id, args.num_envs, args.seed, options.threads, args.episode_limit, args.agent_obsk
        )
        self.space = self.envs.single_action_space
        self.learner = script.Learner(
            self.envs.state_size, self.space.low, self.space.high, args, self.device, self.envs.columns
        )
        self.make_storage()
        self.obs, infos = self.envs.reset()
        self.state = infos["state"]
        self.seconds = []  # of each timed round, by part

    def lap(self, part):
        """Add the time since the last call to a part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.spent[part] += now - self.last
        self.last = now

    def round(self, timed):
        self.spent, self.last = dict.fromkeys(PARTS, 0.0), time.perf_counter()
        with torch.no_grad():
            layers = self.learner.actor.effective_layers()
        for step in range(self.steps):
            with torch.no_grad():
                actions = self.act(layers)
            self.lap("acting")
            on_host = torch.clamp(actions, self.learner.actor.low, self.learner.actor.high).cpu().numpy()
            self.lap("copying")
            self.obs, reward, terminated, truncated, infos = self.envs.step(on_host)
            self.lap("physics")
            self.store(step, actions, reward, infos["final_state"], terminated, truncated)
            self.state = infos["state"]
            self.lap("copying")
        self.update()
        self.lap("updates")
        if timed:
            self.seconds.append(self.spent)


class Matd3(Run):
    def make_storage(self):
        args = self.args
        self.steps, self.updates, self.num_updates = args.train_interval, args.updates_per_round, 0
        rows = 2 * args.batch_size
        sizes = (self.envs.state_size, self.space.shape, args.n_step, args.gamma)
        self.replay = matd3.Replay(rows, args.num_envs, *sizes, self.device, self.envs.columns)
        state = self.envs.reset()[1]["state"]
        for _ in range(rows):  # of real physics, with random actions
            actions = self.envs.action_space.sample()
            _, reward, terminated, truncated, infos = self.envs.step(actions)
            self.replay.add(state, actions, reward, infos["final_state"], terminated, truncated)
            state = infos["state"]

    def act(self, layers):
        actor = self.learner.actor
        actions = actor.act(torch.as_tensor(self.obs, device=self.device), layers)
        return actions + torch.randn_like(actions) * actor.scale * self.args.exploration_noise

    def store(self, step, actions, reward, next_state, terminated, truncated):
        self.replay.add(self.state, actions, reward, next_state, terminated, truncated)

    def update(self):
        for _ in range(self.updates):
            self.num_updates += 1
            batch = self.replay.sample(self.args.batch_size)
            self.learner.update(batch, with_policy=self.num_updates % self.args.policy_freq == 0)


class Mappo(Run):
    def make_storage(self):
        args = self.args
        self.steps, self.updates = args.rollout_steps, args.num_epochs * args.num_minibatches
        sizes = (self.envs.state_size, self.space.shape)
        self.rollout = mappo.Rollout(args.rollout_steps, args.num_envs, *sizes, self.device)

    def act(self, layers):
        torch.set_num_threads(1)
        return self.learner.actor.sample(torch.as_tensor(self.obs, device=self.device), layers)

    def store(self, step, actions, reward, next_state, terminated, truncated):
        ends = dict(terminated=terminated, truncated=truncated)
        self.rollout.add(step, state=self.state, actions=actions, reward=reward, next_state=next_state, **ends)

    def update(self):
        torch.set_num_threads(self.threads)
        self.learner.update(self.rollout)


def machine(options):
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and options.device != "cpu" else "no GPU"
    cpu = platform.processor() or platform.machine()
    return f"{device}, {cpu} with {os.cpu_count()} cores, {options.threads} threads, torch {torch.__version__}"


def main():
    options, flags = tyro.cli(Options, return_unknown_args=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    kinds = {"matd3": (Matd3, matd3), "mappo": (Mappo, mappo)}
    names = [(script, sharing) for script in options.scripts for sharing in options.sharing]
    runs = {name: kinds[name[0]][0](kinds[name[0]][1], name[1], options, flags) for name in names}
    for number in range(options.warmup_rounds + options.rounds):
        for run in runs.values():
            run.round(timed=number >= options.warmup_rounds)

    print(f"{options.env_id}, flags {' '.join(flags) or 'as they are'}; {machine(options)}\n")
    print("| script, sharing | steps/s | ms/update | 10,000,000 steps, hours | acting | physics | copying | updates |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (script, sharing), run in runs.items():
        whole = statistics.median(sum(spent.values()) for spent in run.seconds)
        parts = [statistics.median(spent[part] for spent in run.seconds) for part in PARTS]
        rate = run.steps * run.args.num_envs / whole
        shares = " | ".join(f"{part / sum(parts):.1%}" for part in parts)
        update = parts[-1] / run.updates * 1000
        print(f"| {script}, {sharing} | {rate:,.0f} | {update:.1f} | {1e7 / rate / 3600:.1f} | {shares} |")
        run.envs.close()


if __name__ == "__main__":
    main()
