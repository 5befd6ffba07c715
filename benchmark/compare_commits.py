"""Compare the speed of training at several commits and with several flags: prints one table.

    python benchmark/compare_commits.py --threads 2 --env-ids HalfCheetah-v2-2x3 Humanoid-v2-17x1 --scripts mappo \
        --versions "before=10e3bad" "float32=HEAD --precision float32" "bfloat16=HEAD --precision bfloat16"

Each version is NAME=COMMIT FLAGS. A round runs each version once, one after the other, so that all meet the same
conditions: the commit's own benchmark/training_speed.py, in a new process. The table has medians over rounds:
milliseconds an update, environment steps a second, and after each how many times as fast as the first version (the
ratio within a round). The last column divides steps a second by the steps a second of the physics alone.
"""

import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mamujoco_env import usable_cpus  # noqa: E402


@dataclasses.dataclass
class Options:
    versions: tuple[str, ...] = ("before=HEAD~1", "after=HEAD")
    """versions to compare, each as NAME=COMMIT FLAGS"""
    env_ids: tuple[str, ...] = ("Ant-v2-4x2", "HalfCheetah-v2-2x3")
    """tasks to train on, with their tuned values"""
    scripts: tuple[Literal["matd3", "mappo"], ...] = ("matd3", "mappo")
    """which scripts to measure"""
    threads: int = usable_cpus()
    """threads for the matrix products, and for the physics"""
    rounds: int = 3
    """rounds; each runs every version once"""


def check_out(commit, folder):
    """Write the files of a commit to a folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)


def measure(folder, flags, env_id, script, threads):
    """Run a checkout's training_speed.py. Returns (steps a second, milliseconds an update, physics steps a second)."""
    command = [sys.executable, "benchmark/training_speed.py", "--env-id", env_id, "--scripts", script]
    command += ["--threads", str(threads), "--device", "cpu", "--rounds", "3", "--warmup-rounds", "1", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith(f"| {script},")]
    if done.returncode != 0 or len(rows) != 1:
        sys.exit(f"{' '.join(command)} failed in {folder}:\n{done.stderr[-2000:]}")
    cells = [cell.strip().replace(",", "") for cell in rows[0].strip("|").split("|")]
    return float(cells[1]), float(cells[2]), float(cells[4])


def main():
    options = tyro.cli(Options)
    versions = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, version in enumerate(options.versions):
            name, _, rest = version.partition("=")
            commit, *flags = rest.split()
            folder = Path(temporary, str(number))
            folder.mkdir()
            check_out(commit, folder)
            versions[name] = (folder, flags)
        cpu = platform.processor() or platform.machine()
        print(f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} threads, torch {torch.__version__}")
        print(f"{', '.join(options.versions)}; {options.rounds} rounds\n")
        head = ("script, task", "version", "ms/update", "times as fast", "steps/s", "times as fast", "of physics")
        print("|", " | ".join(head), "|\n" + "| --- " * len(head) + "|")
        for script in options.scripts:
            for env_id in options.env_ids:
                found = {name: [] for name in versions}
                for _ in range(options.rounds):
                    for name, version in versions.items():
                        found[name].append(measure(*version, env_id, script, options.threads))
                first = found[next(iter(versions))]
                for name, rounds in found.items():
                    rate, update, physics = (statistics.median(values) for values in zip(*rounds, strict=True))
                    faster = statistics.median(a[1] / b[1] for a, b in zip(first, rounds, strict=True))
                    more = statistics.median(b[0] / a[0] for a, b in zip(first, rounds, strict=True))
                    row = (f"{script}, {env_id}", name, f"{update:.1f}", f"{faster:.2f}", f"{rate:,.0f}", f"{more:.2f}")
                    print("|", " | ".join(row), f"| {rate / physics:.2f} |", flush=True)


if __name__ == "__main__":
    main()
