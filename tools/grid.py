"""Run a grid of tasks, variants and seeds. Skip finished runs, resume unfinished ones, continue when one fails.

    OMP_NUM_THREADS=1 python tools/grid.py --env-ids Ant-v2-4x2 HalfCheetah-v2-2x3 --seeds 1 2 3 --workers 2 \
        --variants "kaleidoscope=" "full=--sharing full" "none=--sharing none" \
        -- --total-timesteps 2000000 --num-threads 1
    python tools/grid.py --env-ids Ant-v2-4x2 --slurm -- --total-timesteps 10000000 > ant.sh && sbatch ant.sh

Flags after `--` go to all runs. A run's --exp-name is the name of its variant, so its folder is
runs/{env_id}__{variant}__{seed}__{time}. Its output goes to runs/grid_logs. Give the same command again, and the grid
continues: it skips a run that has logged its last checkpoint (without checkpoints, its last evaluation), resumes a run
that has a checkpoint, and starts all others anew. Unfinished runs without a checkpoint go to runs/abandoned, so that
figures.py and judge.py find each run once. The grid neither skips nor resumes a run that was made with other flags, by
another script or before the code changed: such a run counts as failed. --accept-other-code accepts changed code.

Ctrl-C or SIGTERM goes on to the runs: they write checkpoints and end. A second one stops them at once. Exit code: 1 if
a run failed, 130 or 143 after a signal, 2 for a wrong flag, before anything starts. Not on Windows.
"""

import dataclasses
import importlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiment.checkpoints import MAY_CHANGE  # noqa: E402
from experiment.code_identity import compare  # noqa: E402
from experiment.command_line import check_flag_names, fail, require  # noqa: E402
from experiment.run_folder import run_name, take_lock  # noqa: E402

RUN_NAME = re.compile(r"(?P<env_id>.+?)__(?P<exp_name>.+)__(?P<seed>\d+)__(?P<time>\d+)")
LOGS = Path("runs", "grid_logs")
ABANDONED = Path("runs", "abandoned")
MAY_DIFFER = {"exp_name", *MAY_CHANGE}  # between a run and the same one resumed
MAKE_THE_CURVE = {"total_timesteps", "eval_interval", "eval_episodes"}  # a finished run must have these as well
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # TensorBoard warns about every resumed run

SLURM = """\
#!/bin/bash
# give sbatch what your cluster needs as well: sbatch --time 24:00:00 --gres gpu:1 --cpus-per-task 8 THIS_FILE
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --chdir={folder}
#SBATCH --output={logs}/%x_%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# Two minutes before the time limit, this shell tells the run to write a checkpoint and to end, and queues it again.
# At a preemption, SIGTERM reaches the run directly, and this shell only waits.
again=
trap 'again=1; kill -TERM "$run"' USR1
trap : TERM
{command} &
run=$!
wait "$run"; code=$?
while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done
if [ -n "$again" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


@dataclasses.dataclass
class Options:
    env_ids: tuple[str, ...] = ()
    """tasks"""
    variants: tuple[str, ...] = ("kaleidoscope=", "full=--sharing full", "none=--sharing none")
    """variants to compare, each as NAME=FLAGS"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of every variant on every task"""
    script: Path = ROOT / "kalei_mappo_mamujoco.py"
    """the script that trains"""
    workers: int = 1
    """runs at a time; OMP_NUM_THREADS and the runs' --num-threads say how many cores each run takes"""
    checkpoint_interval: int = 100_000
    """environment steps between two checkpoints of a run; 0: none, so a stopped run starts anew"""
    accept_other_code: bool = False
    """also skip and resume runs whose script has changed since, or that do not say which code made them"""
    dry_run: bool = False
    """only print the commands"""
    slurm: bool = False
    """only print an array job for sbatch, with one index per run"""
    only: int | None = None
    """become the run with this number (from 0), in the foreground; the array job uses it"""


@dataclasses.dataclass
class Job:
    """One run of the grid, its flags, and the arguments that the script reads from them."""

    name: str
    flags: list[str]
    args: object

    @property
    def log(self):
        return LOGS / f"{self.name}.log"


def read_events(folder):
    """({name: value} of the hyperparameters, {tag: {step: value}}) of a run's event files.

    Merges the files of a resumed run as TensorBoard does: from the step of the resume, the later file wins. Its
    hyperparameters win too, but `code` names every code that the run was made with.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    hyperparameters, tags = {}, events.Tags()
    if "hyperparameters/text_summary" in tags["tensors"]:
        codes = []
        for event in events.Tensors("hyperparameters/text_summary"):
            for line in event.tensor_proto.string_val[0].decode().splitlines()[2:]:  # a value may hold a bar
                name, _, hyperparameters[name] = line.strip().removeprefix("|").removesuffix("|").partition("|")
            codes += [hyperparameters[name] for name in ("code",) if hyperparameters.get(name) not in (None, *codes)]
        hyperparameters |= {"code": ", ".join(codes)} if codes else {}
    return hyperparameters, {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]}


def make_jobs(options, common_flags):
    """All jobs of the grid, or --only one. The script itself checks flags and tasks."""
    interval, script = options.checkpoint_interval, options.script.resolve()
    require(options.workers >= 1, f"--workers is {options.workers}, expected at least 1")
    require(interval >= 0, f"--checkpoint-interval is {interval}, expected at least 0")
    for name in ("env_ids", "variants", "seeds"):
        values = getattr(options, name)
        expected = "one or more, none of them twice"
        require(0 < len(values) == len(set(values)), f"--{name.replace('_', '-')} is {values}, expected {expected}")
    require(script.is_file(), f"--script is {options.script}, expected a file")
    variants = {}
    for variant in options.variants:
        name, equals, flags = variant.partition("=")
        if not equals or name in variants:
            fail(f"--variants: {variant!r} is one of them, expected NAME=FLAGS, each name once")
        try:
            variants[name] = shlex.split(flags)
        except ValueError as error:
            fail(f"--variants: {variant!r}: {error}")
    cells = [(e, name, s) for e in options.env_ids for name in variants for s in options.seeds]
    if options.only is not None:
        among = 0 <= options.only < len(cells)
        require(among, f"--only is {options.only}, expected a number from 0 to {len(cells) - 1}")
        cells = [cells[options.only]]

    sys.path.insert(0, str(script.parent))
    module = importlib.import_module(script.stem)
    jobs, checked = [], set()
    for env_id, name, seed in cells:
        flags = ["--env-id", env_id, "--exp-name", name, "--seed", str(seed)]
        flags += ["--checkpoint-interval", str(options.checkpoint_interval), *common_flags, *variants[name]]
        args, checkpoint = module.parse_args(flags)
        if checkpoint is not None or args.evaluate is not None:
            fail("--resume or --evaluate is among the runs' flags, expected neither: the grid resumes by itself")
        if (args.env_id, args.exp_name, args.seed) != (env_id, name, seed):
            fail(f"--env-id, --exp-name or --seed is among the flags of {name}, expected none: the grid sets them")
        if (env_id, name) not in checked:  # otherwise a run would refuse a wrong task only when its turn comes
            module.make_env(args, seed, num_envs=1).close()
            checked.add((env_id, name))
        job = Job(run_name(args), flags, args)
        alike = [other.args.exp_name for other in jobs if other.name == job.name]
        if alike:
            fail(f"--variants: {alike[0]!r} and {name!r} have the same folders {job.name}__*, expected one each")
        jobs.append(job)
    return jobs


def is_finished(hyperparameters, scalars, args, steps):
    """Whether a run has logged its last checkpoint and evaluation, if it makes them, or any last step, at `steps`."""
    last = [tag for tag in ("charts/checkpoint_seconds",) if args.checkpoint_interval > 0 and tag in scalars]
    # a run whose only evaluation was ended early has no curve of evaluations yet
    last += ["charts/eval_return"] if hyperparameters.get("eval_episodes") != "0" else []
    test, curves = (all, [scalars.get(tag, {}) for tag in last]) if last else (any, scalars.values())
    return test(max(curve, default=0) >= steps for curve in curves)


def look_up(job, accept_other_code):
    """(action, folder, message, abandoned folders), where the action is "skip", "resume", "start" or "refuse".

    A folder is abandoned if its run is not finished, has no checkpoint, and no process trains in it.
    """
    found = [path for path in Path("runs").glob(f"{job.name}__*") if path.name.rpartition("__")[0] == job.name]
    found = [path for path in found if RUN_NAME.fullmatch(path.name)]
    runs, resumable, abandoned, advice = [], None, [], "rename the variant or move the folder away"
    for folder in sorted(found, key=lambda path: int(path.name.rpartition("__")[2]), reverse=True):  # the newest first
        hyperparameters, scalars = read_events(folder)
        asked, resumes = job.args.total_timesteps, (folder / "checkpoint.pt").exists()
        # a run that cannot go on is finished where it meant to end
        steps = asked if resumes else min(asked, int(hyperparameters.get("total_timesteps", asked)))
        finished = is_finished(hyperparameters, scalars, job.args, steps)
        if finished or resumes:
            runs.append((folder, hyperparameters, finished))
        elif is_held(folder):
            return "refuse", None, f"another process trains in {folder}", []
        else:
            abandoned.append(folder)
    for folder, hyperparameters, finished in runs:
        another_script, difference = compare(hyperparameters, type(job.args))
        if another_script:
            return "refuse", None, f"{folder} {difference}: {advice}", []
        for name, value in dataclasses.asdict(job.args).items():
            before = hyperparameters.get(name, str(value))  # older code may lack this flag
            if before != str(value) and name not in (MAY_DIFFER - MAKE_THE_CURVE if finished else MAY_DIFFER):
                flag = f"--{name.replace('_', '-')}"
                return "refuse", None, f"{folder} was made with {flag} {before}, expected {value}: {advice}", []
        if difference and not accept_other_code:
            return "refuse", None, f"{folder} {difference}: {advice}, or accept it with --accept-other-code", []
        note = f"{folder}, which {difference}" if difference else folder
        if finished:
            return "skip", folder, f"finished before, in {note}", abandoned
        resumable = resumable or (folder, note)
    if resumable:
        return "resume", resumable[0], f"resumes {resumable[1]}", abandoned
    return "start", None, "starts anew" if abandoned else "starts", abandoned


def is_held(folder):
    """Whether another process trains in a run's folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return not take_lock(descriptor)
    finally:
        os.close(descriptor)


def make_command(job, options, action, folder):
    resume = ["--resume", str(folder)] if action == "resume" else []
    return [sys.executable, str(options.script.resolve()), *job.flags, *resume]


def claim(job, accept_other_code):
    """(log, action, folder, message): a descriptor, locked while the grid or the run holds it, and look_up's answer.

    Moves abandoned folders away, so that figures find one run. If the log cannot be opened, or another process holds
    it: (None, "refuse", None, the reason).
    """
    try:
        LOGS.mkdir(parents=True, exist_ok=True)
        log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if not take_lock(log):
            os.close(log)
            return None, "refuse", None, f"runs already, see {job.log}"
        action, folder, message, abandoned = look_up(job, accept_other_code)
        for left in abandoned:
            ABANDONED.mkdir(exist_ok=True)
            left.rename(ABANDONED / left.name)
            message += f"; {left}, without a checkpoint, is now in {ABANDONED}"
    except OSError as error:
        return None, "refuse", None, f"{error.filename}: {error.strerror}"
    return log, action, folder, message


def print_array_job(options, argv, num_jobs):
    """Print the file for sbatch, which runs this command with --only."""
    require(options.only is None, f"--only is {options.only}, expected nothing beside --slurm")
    end = argv.index("--") if "--" in argv else len(argv)
    again = [flag for flag in argv[:end] if flag != "--slurm"] + argv[end:]
    command = f'{shlex.join([sys.executable, str(Path(__file__).resolve())])} --only "$SLURM_ARRAY_TASK_ID"'
    LOGS.mkdir(parents=True, exist_ok=True)  # Slurm makes no folders
    folder = shlex.quote(str(Path.cwd()))
    command += f" {shlex.join(again)}"
    print(SLURM.format(name=options.script.stem, last=num_jobs - 1, folder=folder, logs=LOGS, command=command), end="")


def become(job, options):
    """Replace this process by the run: signals reach the run alone, and its exit code becomes ours."""
    log, action, folder, what = claim(job, options.accept_other_code)
    print(f"{job.name}: {what}", flush=True)
    if action in ("skip", "refuse"):
        sys.exit(action == "refuse")
    command = make_command(job, options, action, folder)
    os.set_inheritable(log, True)  # the lock
    os.execv(command[0], command)


def run_all(jobs, options):
    """Keep --workers runs going until all have ended or a signal comes. Returns the exit code."""
    received, told = [], 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    waiting, running, failed = list(enumerate(jobs, start=1)), [], 0
    while running or waiting and not received:
        while waiting and len(running) < options.workers and not received:
            number, job = waiting.pop(0)
            line = f"[{number}/{len(jobs)}] {job.name}"
            log, action, folder, what = claim(job, options.accept_other_code)
            if action in ("start", "resume"):
                what += f", see {job.log}"
                # its own process group, so that Ctrl-C reaches the run only once, from here
                streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
                process = subprocess.Popen(make_command(job, options, action, folder), **streams)
                running.append((line, job, process, time.monotonic()))
            if log is not None:
                os.close(log)
            failed += action == "refuse"
            print(f"{line}: {what}", flush=True)
        for number in received[told:]:
            told += 1
            print(f"{signal.Signals(number).name}: {len(running)} runs are told to stop", flush=True)
            for _, _, process, _ in running:
                process.send_signal(number)
        for entry in running[:]:
            line, job, process, start = entry
            if process.poll() is not None:
                running.remove(entry)
                failed += process.returncode != 0
                said = f": {last_line(job.log)}" if process.returncode else ""
                minutes = (time.monotonic() - start) / 60
                print(f"{line}: exit code {process.returncode} after {minutes:.1f} minutes{said}", flush=True)
        time.sleep(0.1)
    if received:
        return 128 + received[0]
    print(f"{len(jobs)} runs, {failed} failed")
    return int(failed > 0)


def last_line(path):
    """The last line of a run's log, without the progress bar on the same line."""
    lines = path.read_text(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def main():
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    options = tyro.cli(Options, args=check_flag_names(argv[:end], Options))
    jobs = make_jobs(options, argv[end + 1 :])
    if options.slurm:
        print_array_job(options, argv, len(jobs))
    elif options.dry_run:
        for job in jobs:
            action, folder, what, _ = look_up(job, options.accept_other_code)
            command = make_command(job, options, action, folder)
            print(f"# {job.name}: {what}" if action in ("skip", "refuse") else shlex.join(command))
    elif options.only is not None:
        become(jobs[0], options)
    else:
        sys.exit(run_all(jobs, options))


if __name__ == "__main__":
    main()
