"""Speed of Kaleidoscope-MAPPO: seconds of acting and of learning in an iteration, and environment steps a second.

    python benchmark/mappo_speed.py --env-id Ant-v2-4x2 --threads 2
    python benchmark/mappo_speed.py --num-critics 5  # flags that are not its own go to the script

An iteration is a rollout and all its updates, with the values tuned for the env id and as in the script's main loop,
without logging. The ways of sharing take turns, iteration by iteration, so that they meet the same conditions. Prints
medians over the timed iterations.
"""

import dataclasses
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kalei_mappo_mamujoco import Learner, Rollout, parse_args  # noqa: E402
from mamujoco_env import MaMuJoCoVecEnv  # noqa: E402


@dataclasses.dataclass
class Options:
    env_id: str = "Ant-v2-4x2"
    """task whose sizes and tuned values are used"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where networks, rollouts and updates live"""
    threads: int = 2
    """threads for the matrix products and for the physics"""
    sharing: tuple[Literal["kaleidoscope", "full", "none"], ...] = ("kaleidoscope", "full", "none")
    """which ways of sharing to measure"""
    iterations: int = 5
    """timed iterations of each"""
    warmup_iterations: int = 1
    """iterations before these, not timed"""


class Run:
    """A training run, without what does not cost time."""

    def __init__(self, sharing, options, flags):
        self.args = args = parse_args(["--env-id", options.env_id, "--sharing", sharing, *flags])[0]
        self.device = torch.device(options.device)
        self.envs = MaMuJoCoVecEnv(args.env_id, args.num_envs, args.seed, options.threads, args.episode_limit)
        space = self.envs.single_action_space
        self.learner = Learner(self.envs.state_size, space.low, space.high, args, self.device)
        self.rollout = Rollout(args.rollout_steps, args.num_envs, self.envs.state_size, space.shape, self.device)
        self.obs, infos = self.envs.reset()
        self.state = infos["state"]
        self.seconds = {"physics": [], "rollout": [], "update": []}

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def iterate(self, timed):
        actor, start, physics = self.learner.actor, self.now(), 0.0
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.no_grad():
            layers = actor.effective_layers()
        for step in range(self.args.rollout_steps):
            with torch.no_grad():
                actions = actor.sample(torch.as_tensor(self.obs, device=self.device), layers)
                clipped = torch.clamp(actions, actor.low, actor.high).cpu().numpy()
            stepped = time.perf_counter()
            self.obs, reward, terminated, truncated, infos = self.envs.step(clipped)
            physics += time.perf_counter() - stepped
            outcome = dict(reward=reward, next_state=infos["final_state"], terminated=terminated, truncated=truncated)
            self.rollout.add(step, state=self.state, actions=actions, **outcome)
            self.state = infos["state"]
        torch.set_num_threads(threads)
        acted = self.now()
        self.learner.update(self.rollout)
        if timed:
            for name, value in (("physics", physics), ("rollout", acted - start), ("update", self.now() - acted)):
                self.seconds[name].append(value)


def main():
    options, flags = tyro.cli(Options, return_unknown_args=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    runs = {sharing: Run(sharing, options, flags) for sharing in options.sharing}
    for iteration in range(options.warmup_iterations + options.iterations):
        for run in runs.values():
            run.iterate(timed=iteration >= options.warmup_iterations)

    args = next(iter(runs.values())).args
    machine = f"{platform.machine()}, {options.device}, {options.threads} threads, torch {torch.__version__}"
    print(f"{options.env_id}, {machine}")
    shape = f"{args.num_envs} environments x {args.rollout_steps} steps, {args.num_epochs} epochs"
    print(f"{shape}, flags: {' '.join(flags) or 'none'}")
    print("medians of an iteration\n")
    print("| sharing | rollout, s | of it environment, s | update, s | environment steps/s |")
    print("| --- | --- | --- | --- | --- |")
    for sharing, run in runs.items():
        physics, rollout, update = (statistics.median(values) for values in run.seconds.values())
        whole = statistics.median(map(sum, zip(run.seconds["rollout"], run.seconds["update"], strict=True)))
        rate = run.args.num_envs * run.args.rollout_steps / whole
        print(f"| {sharing} | {rollout:.3f} | {physics:.3f} | {update:.3f} | {rate:,.0f} |")
        run.envs.close()


if __name__ == "__main__":
    main()
