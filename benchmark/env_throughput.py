"""How fast environments step: ours, Gymnasium's, and bare physics as the limit.

    python benchmark/env_throughput.py
    python benchmark/env_throughput.py --env-ids Ant-v2-4x2 Humanoid-v2-17x1 --num-envs 32 --num-threads 4

Prints a line that names the machine and the versions, and then one table with a row per env id. Its columns, in
environment steps per second of all environments together, the median over the rounds:

  limit       bare mujoco.batch.Batch on the same trajectory as ours: controls, physics and the recorded starts of
              episodes, without any observation, reward or termination
  ours        MaMuJoCoVecEnv.step: observations, rewards, terminations and automatic resets included
  sync        gymnasium.vector.SyncVectorEnv over Gymnasium's v4 or v5 task
  async       gymnasium.vector.AsyncVectorEnv over the same, a process per environment
  ours/limit  the median of the rounds' own ratios, and the smallest and the largest
  ours/async  the median of the rounds' own ratios

Every round measures all four in turn, so that a drift of the machine's speed hits all alike. Tasks that Gymnasium
does not have show "-" in its columns.
"""

import os
import platform
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import tyro
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from mujoco.batch import Batch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mamujoco_env import MaMuJoCoVecEnv  # noqa: E402, the path comes first


@dataclass
class Args:
    env_ids: tuple[str, ...] = (
        "Ant-v2-4x2",
        "HalfCheetah-v2-2x3",
        "Hopper-v2-3x1",
        "Walker2d-v2-2x3",
        "Humanoid-v2-17x1",
    )
    """the environments to measure"""
    num_envs: int = 10
    """environments stepped together"""
    num_threads: int = 0
    """threads of ours and of the limit, 0 for one per CPU"""
    steps: int = 500
    """vector steps a round; Gymnasium's vector environments, which are slow, make a fifth of them"""
    rounds: int = 7
    """rounds, of which the median is reported"""
    seed: int = 1
    """of the actions and the resets"""


class Ours:
    """Our environment on one trajectory, which every round repeats, and which the limit replays."""

    def __init__(self, args, env_id):
        self.envs = MaMuJoCoVecEnv(env_id, args.num_envs, args.seed, args.num_threads)
        rng, space = np.random.default_rng(args.seed), self.envs.action_space
        self.actions = rng.uniform(space.low, space.high, (args.steps, *space.shape)).astype(np.float32)
        self.envs.reset()
        self.start = self.envs.get_state()
        # A reset clears its environments' controls, so that these are kept as they are handed to the physics.
        self.controls, self.resets = [], []  # (T, E, nu); for each step None or (environments, rows of batch.state)
        step = self.envs.batch.step

        def keep_controls(**arguments):
            self.controls.append(self.envs.batch.ctrl.copy())
            step(**arguments)

        self.envs.batch.step = keep_controls
        for actions in self.actions:
            *_, infos = self.envs.step(actions)
            ids = np.flatnonzero(infos["_final_obs"])
            self.resets.append((ids, self.envs.batch.state[ids]) if len(ids) else None)
        del self.envs.batch.step  # the class's own is back
        self.controls = np.array(self.controls)
        self.qpos = self.envs.batch.qpos.copy()

    def measure(self):
        """Steps per second, over the whole trajectory."""
        self.envs.set_state(self.start)
        began = time.perf_counter()
        for actions in self.actions:
            self.envs.step(actions)
        seconds = time.perf_counter() - began
        assert np.array_equal(self.envs.batch.qpos, self.qpos), "ours left its own trajectory"
        return self.actions.shape[0] * self.envs.num_envs / seconds


class Limit:
    """The physics of a recorded trajectory of ours, and nothing else."""

    def __init__(self, ours):
        self.ours, batch = ours, ours.envs.batch
        self.frame_skip = ours.envs.task.frame_skip
        self.batch = Batch(batch.model, batch.nsim, batch.nthread)  # binds no derived field
        self.measure()

    def measure(self):
        ours, batch, frame_skip = self.ours, self.batch, self.frame_skip
        state, ctrl = batch.state, batch.bind("ctrl")
        state[:] = ours.start["physics"]
        began = time.perf_counter()
        for controls, reset in zip(ours.controls, ours.resets, strict=True):
            ctrl[:] = controls
            batch.step(nstep=frame_skip)
            if reset is not None:
                ids, rows = reset
                state[ids] = rows
        seconds = time.perf_counter() - began
        assert np.array_equal(batch.bind("qpos"), ours.qpos), "the limit did other physics than ours"
        return len(ours.controls) * batch.nsim / seconds


def make(task):
    warnings.simplefilter("ignore", DeprecationWarning)  # Gymnasium calls its v4 tasks out of date
    return gymnasium.make(task, disable_env_checker=True)


class Gymnasium:
    """One of Gymnasium's vector environments, which goes on from round to round, on the controls of ours."""

    def __init__(self, kind, task, ours, steps, seed):
        # A fork would copy the batches but not their threads, and hang where it frees one.
        options = {"context": "forkserver"} if kind is AsyncVectorEnv else {}
        self.envs = kind([lambda: make(task)] * ours.envs.num_envs, **options)
        self.controls = ours.controls[:steps].astype(np.float32)
        self.envs.reset(seed=seed)
        self.envs.step(self.controls[0])

    def measure(self):
        began = time.perf_counter()
        for controls in self.controls:
            self.envs.step(controls)
        return len(self.controls) * self.envs.num_envs / (time.perf_counter() - began)


def measure(args, env_id):
    """Steps per second by kind: {name: (rounds,)}."""
    ours = Ours(args, env_id)
    kinds = {"limit": Limit(ours), "ours": ours}
    task = env_id.rpartition("-")[0].replace("-v2", "-v4")
    if task in gymnasium.registry:
        for name, kind in (("sync", SyncVectorEnv), ("async", AsyncVectorEnv)):
            kinds[name] = Gymnasium(kind, task, ours, max(args.steps // 5, 1), args.seed)
    speeds = {name: np.zeros(args.rounds) for name in kinds}
    for k in range(args.rounds):
        for name, kind in kinds.items():
            speeds[name][k] = kind.measure()
    for name in kinds.keys() - {"limit"}:
        kinds[name].envs.close()
    return speeds


def row(env_id, speeds):
    """The table's cells for one env id."""

    def speed(name):
        return f"{np.median(speeds[name]):,.0f}" if name in speeds else "-"

    share = speeds["ours"] / speeds["limit"]
    cells = [env_id, *map(speed, ("limit", "ours", "sync", "async"))]
    cells.append(f"{np.median(share):.3f} ({share.min():.3f} to {share.max():.3f})")
    cells.append(f"{np.median(speeds['ours'] / speeds['async']):.1f}" if "async" in speeds else "-")
    return cells


def machine():
    """The CPU, its cores and the versions, in a line."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (mujoco, np, gymnasium))
    return f"{cpu}, {os.cpu_count()} cores, {versions}"


def main(args):
    table = [["environment steps per second", "limit", "ours", "sync", "async", "ours/limit", "ours/async"]]
    table += [row(env_id, measure(args, env_id)) for env_id in args.env_ids]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(machine())
    print(
        f"{args.num_envs} environments, {args.num_threads or 'all'} threads, {args.steps} steps, {args.rounds} rounds"
    )
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


if __name__ == "__main__":  # the processes of AsyncVectorEnv may import this file
    main(tyro.cli(Args))
