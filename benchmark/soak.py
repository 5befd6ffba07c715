"""Train for a long time. Kill the run at random moments, resume it each time, and check that nothing was lost.

    python benchmark/soak.py --minutes 120 --kill-after 30 300
    python benchmark/soak.py --kills 100 --kill-after 0.1 4  # a hundred kills -9 of a small run
    python benchmark/soak.py --script kalei_mappo_mamujoco.py --minutes 30  # the script gets other flags
    python benchmark/soak.py --folder killed --total-timesteps 100000  # to the run's end, and keep it

A kill is SIGKILL or, one time in four, SIGTERM. It comes --kill-after seconds after the run has resumed or has written
its first checkpoint. After every kill, we read the checkpoint and resume from it; its step must not be lower than
before. Prints a line for each life of the run: how it ended, its steps, and the process's resident memory, threads and
open files. When a run reaches its end with exit code 0, the test ends. Exit code 1 if anything was lost. Linux only
(/proc).
"""

import contextlib
import dataclasses
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiment.checkpoints import read_checkpoint  # noqa: E402

SMALL = "--env-id HalfCheetah-v2-2x3 --device cpu --total-timesteps 1000000000 --hidden-size 64"
SMALL += " --checkpoint-interval 1000 --log-interval 1000 --eval-interval 20000 --eval-episodes 2 --num-threads 1"
SMALL_REPLAY = "--buffer-size 20000 --warmup-steps 2000 --batch-size 100 --num-critics 3"
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20  # MiB


@dataclasses.dataclass
class Options:
    script: Literal["kalei_matd3_mamujoco.py", "kalei_mappo_mamujoco.py"] = "kalei_matd3_mamujoco.py"
    """script that trains, by default with a small network and a small replay buffer"""
    minutes: float = 1e9
    """stop after this many minutes"""
    kills: int = 10**9
    """stop after this many kills"""
    kill_after: tuple[float, float] = (5.0, 60.0)
    """lowest and highest number of seconds until a kill, drawn uniformly"""
    seed: int = 0
    """random seed of the moments and kinds of kills"""
    folder: str | None = None
    """new or empty folder that keeps the run and its output; default: a temporary folder"""


def usage(pid):
    """(resident MiB, threads, open files) of a process."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    return resident, len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))


def wait_for(condition, process, seconds=300):
    """Wait until the condition holds. Returns False if the process ends or the seconds pass before."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def main():
    options, flags = tyro.cli(Options, return_unknown_args=True)
    args_class = importlib.import_module(options.script.removesuffix(".py")).Args
    draw = random.Random(options.seed)
    base = SMALL.split() + (SMALL_REPLAY.split() if "matd3" in options.script else []) + flags
    failures = kills = last_step = 0
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder).mkdir(parents=True, exist_ok=True)
        output = stack.enter_context(open(Path(folder, "output"), "wb"))
        command = [sys.executable, str(ROOT / options.script)]
        run = None
        print("| life | ended by | from step | to step | MiB early | MiB late | MiB highest | threads | open files |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        while kills < options.kills and time.monotonic() - start < options.minutes * 60:
            more = base if run is None else ["--resume", str(run)]
            process = subprocess.Popen(command + more, cwd=folder, stdout=output, stderr=output)
            if run is None:
                started = wait_for(lambda: list(Path(folder).glob("runs/*/checkpoint.pt")), process)
                run = next(Path(folder).glob("runs/*"))
            else:  # a resumed run writes a new event file
                known = len(list(run.glob("events*")))
                started = wait_for(lambda run=run, known=known: len(list(run.glob("events*"))) > known, process)
            if not started:
                failures += 1
                print(f"life {kills + 1} did not start; its output ends with")
                print("\n".join(Path(folder, "output").read_text(errors="replace").splitlines()[-5:]))
                process.kill()
                break
            after = draw.uniform(*options.kill_after)
            samples, end = [], time.monotonic() + after
            while time.monotonic() < end and process.poll() is None:
                samples.append(usage(process.pid))
                time.sleep(min(1.0, max(end - time.monotonic(), 0)))
            ended = process.poll()
            if ended == 0:
                last_step = read_checkpoint(run, args_class)["counters"][0]
                print(f"| {kills + 1} | its end (0) | | {last_step} | | | {max(s[0] for s in samples):.0f} | | |")
                break
            number = signal.SIGTERM if draw.random() < 0.25 else signal.SIGKILL
            process.send_signal(number)
            code = process.wait(300)
            kills += 1
            try:
                step = read_checkpoint(run, args_class)["counters"][0]
            except SystemExit:
                step = -1
            expected = 143 if number == signal.SIGTERM else -9
            wrong = ended is not None or code != expected or step < last_step
            failures += wrong
            resident, threads, files = zip(*(samples or [(0, 0, 0)]), strict=True)
            early, late = resident[len(resident) // 3], resident[-1]
            memory = f"{early:.0f} | {late:.0f} | {max(resident):.0f}"
            what = f"{signal.Signals(number).name}{', WRONG' if wrong else ''}"
            print(
                f"| {kills} | {what} ({code}) | {last_step} | {step} | {memory} | {threads[-1]} | {files[-1]} |",
                flush=True,
            )
            last_step = step
    minutes = (time.monotonic() - start) / 60
    print(f"\n{options.script}: {kills} kills in {minutes:.0f} minutes, {last_step} steps, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
