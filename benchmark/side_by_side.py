"""Do runs side by side slow each other down? Times an update of one run alone, and of several runs at once.

    python benchmark/side_by_side.py
    GOMP_SPINCOUNT=10000 python benchmark/side_by_side.py  # waiting threads spin so many times before they sleep

Each run is benchmark/training_speed.py in its own process, with one thread per CPU, as a user would start it. A round
measures one run alone, then all runs at once. Prints milliseconds an update, medians over rounds. "share" is the speed
of the slowest of several runs, relative to one run alone; a fair share of the machine would be 1 / runs.
"""

import concurrent.futures
import dataclasses
import os
import statistics
import sys
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.compare_commits import measure  # noqa: E402
from mamujoco_env import usable_cpus  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Options:
    env_id: str = "HalfCheetah-v2-2x3"  # task to train on
    script: Literal["matd3", "mappo"] = "matd3"  # which script to run
    runs: int = 2  # runs at once
    rounds: int = 3  # rounds; each measures one run, then several at once


def measure_at_once(options, runs):
    """Milliseconds an update of each of several runs at once."""
    with concurrent.futures.ThreadPoolExecutor(runs) as pool:
        task = (ROOT, [], options.env_id, options.script, usable_cpus())
        return [each.result()[1] for each in [pool.submit(measure, *task) for _ in range(runs)]]


def shares(options):
    """(ms an update of one run alone, ms an update of the slowest of several runs), medians over rounds."""
    found = [
        (measure_at_once(options, 1)[0], max(measure_at_once(options, options.runs))) for _ in range(options.rounds)
    ]
    return tuple(statistics.median(column) for column in zip(*found, strict=True))


def main():
    options = tyro.cli(Options)
    alone, together = shares(options)
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    waiting = [f"{name}={os.environ[name]}" for name in names if name in os.environ] or ["threads wait as by default"]
    print(f"{options.script}, {options.env_id}, {usable_cpus()} threads a run, {', '.join(waiting)}")
    print(
        f"alone {alone:.1f} ms an update; {options.runs} runs at once {together:.1f} ms; share {alone / together:.2f}"
    )


if __name__ == "__main__":
    main()
