"""How fast environments step: ours, EnvPool's, Gymnasium's, and bare physics as the limit.

    python benchmark/env_throughput.py
    python benchmark/env_throughput.py --env-ids Ant-v2-4x2 Humanoid-v2-17x1 --num-envs 32 --num-threads 4

Prints a line that names the machine and the versions, then a table with a row per env id. The first columns are
environment steps per second, summed over environments, the median over rounds:

  limit       bare mujoco.batch.Batch on the same trajectory as ours: it sets the recorded controls and starts of
              episodes and steps the physics, without any observation, reward or termination
  ours        MaMuJoCoVecEnv.step, with observations, rewards, terminations and automatic resets
  envpool     EnvPool's v4 or v5 task, written in C++; no column if it is not installed (pip install envpool)
  sync        gymnasium.vector.SyncVectorEnv with Gymnasium's v4 or v5 task
  async       gymnasium.vector.AsyncVectorEnv with the same task, one process per environment
  ours/limit  ratio within a round: median over rounds, lowest and highest
  ours/envpool, ours/async  ratio within a round: median over rounds

Every round measures all of them, one after the other, so a change of the machine's speed affects all alike. "-" means
that EnvPool or Gymnasium does not have the task.

With the same controls, environments and threads, EnvPool still differs:
  * It has one agent, which observes the state (Ant-v4: without contact forces, which are zero in ours). Ours makes an
    observation for every agent, checks the actions and maps them from agents to joints.
  * It contains another version of MuJoCo (3.6.0 in EnvPool 1.2.5), so physics, speed and episodes differ.
  * It resets an environment in the step after the end of an episode. This step ignores the action; we do not count it.
    Ours resets in the same step, and returns the final and the first observation.
  * It steps all environments at once here, as ours does. We do not measure its asynchronous mode, which returns the
    environments that are ready first.
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

try:
    import envpool
except ImportError:
    envpool = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mamujoco_env import MaMuJoCoVecEnv, usable_cpus  # noqa: E402, the path comes first


@dataclass
class Args:
    env_ids: tuple[str, ...] = (
        "Ant-v2-4x2",
        "HalfCheetah-v2-2x3",
        "Hopper-v2-3x1",
        "Walker2d-v2-2x3",
        "Humanoid-v2-17x1",
    )
    """tasks to measure"""
    num_envs: int = 10
    """number of environments, stepped together"""
    num_threads: int = 0
    """threads for ours, EnvPool and the limit; 0: one per CPU"""
    steps: int = 500
    """vector steps per round; Gymnasium's vector environments are slow and make a fifth of them"""
    rounds: int = 7
    """rounds; the table shows medians over rounds"""
    seed: int = 1
    """random seed of actions and resets"""


class Ours:
    """Our environment on one trajectory. Every round repeats the trajectory, and the limit replays it."""

    def __init__(self, args, env_id):
        self.envs = MaMuJoCoVecEnv(env_id, args.num_envs, args.seed, args.num_threads)
        rng, space = np.random.default_rng(args.seed), self.envs.action_space
        self.actions = rng.uniform(space.low, space.high, (args.steps, *space.shape)).astype(np.float32)
        self.envs.reset()
        self.start = self.envs.get_state()
        # a reset clears controls, so record them when the physics gets them
        self.controls, self.resets = [], []  # (T, E, nu); per step None or (environments, rows of batch.state)
        step = self.envs.batch.step

        def keep_controls(**arguments):
            self.controls.append(self.envs.batch.ctrl.copy())
            step(**arguments)

        self.envs.batch.step = keep_controls
        for actions in self.actions:
            *_, infos = self.envs.step(actions)
            ids = np.flatnonzero(infos["_final_obs"])
            self.resets.append((ids, self.envs.batch.state[ids]) if len(ids) else None)
        del self.envs.batch.step  # restores the class's method
        self.controls = np.array(self.controls)
        self.qpos = self.envs.batch.qpos.copy()

    def measure(self):
        """Steps per second over the whole trajectory."""
        self.envs.set_state(self.start)
        began = time.perf_counter()
        for actions in self.actions:
            self.envs.step(actions)
        seconds = time.perf_counter() - began
        assert np.array_equal(self.envs.batch.qpos, self.qpos), "ours left its own trajectory"
        return self.actions.shape[0] * self.envs.num_envs / seconds


class Limit:
    """Only the physics of our recorded trajectory."""

    def __init__(self, ours):
        self.ours, batch = ours, ours.envs.batch
        self.frame_skip = ours.envs.task.frame_skip
        self.batch = Batch(batch.model, batch.nsim, batch.nthread)  # without derived arrays
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
    warnings.simplefilter("ignore", DeprecationWarning)  # Gymnasium warns that v4 tasks are out of date
    return gymnasium.make(task, disable_env_checker=True)


class Gymnasium:
    """One of Gymnasium's vector environments, with our controls. It is not reset between rounds."""

    def __init__(self, kind, task, ours, steps, seed):
        # a fork would copy the batches without their threads, and hang when it frees one
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


class EnvPool:
    """EnvPool's vector environment, with our controls. It is not reset between rounds."""

    def __init__(self, task, ours, seed):
        num_envs, num_threads = ours.envs.num_envs, ours.envs.batch.nthread
        self.envs = envpool.make(task, env_type="gymnasium", num_envs=num_envs, num_threads=num_threads, seed=seed)
        self.controls = ours.controls
        self.envs.reset()
        self.envs.step(self.controls[0])

    def measure(self):
        ages = []  # steps so far of each environment's episode; 0 in a step that resets it
        began = time.perf_counter()
        for controls in self.controls:
            *_, infos = self.envs.step(controls)
            ages.append(infos["elapsed_step"])
        seconds = time.perf_counter() - began
        return np.count_nonzero(ages) / seconds


def measure(args, env_id):
    """{kind: steps per second (rounds,)}."""
    ours = Ours(args, env_id)
    kinds = {"limit": Limit(ours), "ours": ours}
    task = env_id.rpartition("-")[0].replace("-v2", "-v4")
    if envpool and task in envpool.list_all_envs():
        kinds["envpool"] = EnvPool(task, ours, args.seed)
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
    """{column: cell} of the table's row for one env id."""
    cells = {"environment steps per second": env_id}
    cells |= {name: f"{np.median(speed):,.0f}" for name, speed in speeds.items()}
    share = speeds["ours"] / speeds["limit"]
    cells["ours/limit"] = f"{np.median(share):.3f} ({share.min():.3f} to {share.max():.3f})"
    for other, digits in (("envpool", 2), ("async", 1)):
        if other in speeds:
            cells[f"ours/{other}"] = f"{np.median(speeds['ours'] / speeds[other]):.{digits}f}"
    return cells


def machine():
    """A line with the CPU, its cores and the versions."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    modules = [mujoco, np, gymnasium] + ([envpool] if envpool else [])
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    return f"{cpu}, {usable_cpus()} cores, {versions}"


def main(args):
    columns = ["environment steps per second", "limit", "ours", "envpool", "sync", "async"]
    columns += ["ours/limit", "ours/envpool", "ours/async"]
    if not envpool:
        columns = [column for column in columns if "envpool" not in column]
    rows = [row(env_id, measure(args, env_id)) for env_id in args.env_ids]
    table = [columns] + [[cells.get(column, "-") for column in columns] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(machine())
    print(
        f"{args.num_envs} environments, {args.num_threads or 'all'} threads, {args.steps} steps, {args.rounds} rounds"
    )
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    if envpool:
        print("envpool: single-agent v4 or v5 tasks without agents' observations, on a MuJoCo of its own; steps of all")
        print("environments at once; its resets take a step more, which is not counted")


if __name__ == "__main__":  # the processes of AsyncVectorEnv may import this file
    main(tyro.cli(Args))
