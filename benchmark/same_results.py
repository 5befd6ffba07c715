"""Do the scripts give the same results as at another commit? Compares the saved models' weights and all curves.

    python benchmark/same_results.py 35ae519
    python benchmark/same_results.py HEAD~1 --steps 2000 --scripts mappo --sharing full -- --precision float32

Both versions run side by side, one thread each, for each script and way of sharing. Flags after `--` go to the scripts.
If only one version knows a flag, only that version gets it. Prints a line for each tensor of model.pt and each curve
that differs in any bit; curves of times are left out. Exit code 1 if something differs.
"""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark.compare_commits import check_out  # noqa: E402
from tools.grid import read_events  # noqa: E402

TIMES = ("charts/SPS", "charts/checkpoint_seconds")  # these differ from run to run


@dataclasses.dataclass
class Options:
    commit: tyro.conf.Positional[str]  # git's name of the version to compare with
    steps: int = 20_000  # environment steps of each run
    env_id: str = "HalfCheetah-v2-2x3"  # task to train on
    seed: int = 1  # random seed of all runs
    scripts: tuple[Literal["matd3", "mappo"], ...] = ("matd3", "mappo")  # scripts to run
    sharing: tuple[Literal["kaleidoscope", "full", "none"], ...] = ("kaleidoscope", "full", "none")  # ways of sharing


def known_flags(script):
    """The names of the flags in a script's help."""
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--([\w-]+)", done.stdout))


def start(script, flags, folder):
    """Start a run in a new folder, with those of the flags {name: value or None} that the script knows."""
    known, command = known_flags(script), [sys.executable, str(script)]
    for name, value in flags.items():
        if name in known:
            command += [f"--{name}"] if value is None else [f"--{name}", *value.split()]
    folder.mkdir(parents=True)
    with open(folder / "output", "w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


def results(folder):
    """{name: tensor} of the run in a folder: the model's weights, and curves (steps, 2) of step and value."""
    (run,) = (folder / "runs").iterdir()
    model = torch.load(run / "model.pt", weights_only=True)
    found = {f"model.pt {net} {name}": x for net in ("actor", "critic") for name, x in model[net].items()}
    for tag, curve in read_events(run)[1].items():
        if tag not in TIMES:
            found[tag] = torch.tensor(list(curve.items()), dtype=torch.float64)
    return found


def difference(new, old):
    """The difference between two tensors (or None) in words; "" if they are the same, bit for bit."""
    if new is None or old is None:
        return "is not there" if new is None else "was not there"
    if (new.dtype, new.shape) != (old.dtype, old.shape):
        return f"is {new.dtype} {tuple(new.shape)} and was {old.dtype} {tuple(old.shape)}"
    if new.numpy().tobytes() == old.numpy().tobytes():
        return ""
    apart = (new != old).flatten().nonzero()  # empty if only the sign of a zero or a NaN differs
    where = apart[0].item() if len(apart) else 0
    values = f"{new.flatten()[where].item()!r} and was {old.flatten()[where].item()!r}"
    return f"differs in {len(apart)} of {new.numel()} numbers, the first is {values}"


def main():
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    options = tyro.cli(Options, args=argv[:end])
    flags = {"total-timesteps": str(options.steps), "env-id": options.env_id, "seed": str(options.seed)}
    flags |= {"device": "cpu", "num-threads": "1", "log-interval": "1000", "save-model": None}
    for flag in " ".join(argv[end + 1 :]).split("--")[1:]:
        name, _, value = flag.strip().replace("=", " ").partition(" ")
        flags[name] = value or None
    compared = differing = 0
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "before")
        before.mkdir()
        check_out(options.commit, before)
        for script in options.scripts:
            for sharing in options.sharing:
                runs = {Path(folder, f"{script}_{sharing}_{side}"): side for side in ("new", "old")}
                started = []
                for run, side in runs.items():
                    path = (ROOT if side == "new" else before) / f"kalei_{script}_mamujoco.py"
                    started.append(start(path, flags | {"sharing": sharing}, run))
                for run, process in zip(runs, started, strict=True):
                    if process.wait() != 0:
                        output = (run / "output").read_text()[-2000:]
                        sys.exit(f"{script} {sharing}: a run has failed with code {process.returncode}:\n{output}")
                new, old = map(results, runs)
                compared += len(old)
                for name in sorted(new.keys() | old.keys()):
                    if what := difference(new.get(name), old.get(name)):
                        differing += 1
                        print(f"{script} {sharing}: {name} {what}", flush=True)
    print(f"{compared} tensors and curves of {options.commit}: {differing} differ")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
