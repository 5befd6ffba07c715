"""Open a saved model for evaluation, and the flags of the tools that take one. For both scripts and their copies."""

import dataclasses
import importlib
import sys
from pathlib import Path

import torch
import tyro

from experiment.checkpoints import refuse_damage
from experiment.code_identity import ROOT
from experiment.command_line import require
from experiment.saved_models import EXPECTED, load_actor, read_model


@dataclasses.dataclass
class ModelOptions:
    model: tyro.conf.Positional[Path]
    """a file that --save-model wrote, or its folder"""
    script: Path | None = None
    """the script that made it; default: the file of that name in the repository"""


@dataclasses.dataclass
class EvaluationOptions(ModelOptions):
    eval_episodes: int = 40
    """episodes of each evaluation"""
    num_threads: int = 1
    """threads on the CPU"""


def script_of(path, script=None):
    """The module of the script that made a model, or of `script`. Guesses it for models that do not name theirs."""
    _, model = read_model(path)
    with refuse_damage(path, EXPECTED):
        guess = "mappo" if "output_gain" in dict(model.get("args", {})) else "matd3"
        name = Path(str(model.get("script", f"kalei_{guess}_mamujoco.py"))).name
    file = script or ROOT / name
    require(file.is_file(), f"{path} was made by {name}, expected it in {ROOT} or with --script: {file} is no file")
    sys.path.insert(0, str(file.resolve().parent))
    return importlib.import_module(file.stem)


def open_model(options):
    """(script, actor, args) for EvaluationOptions. script: the module."""
    for name in ("eval_episodes", "num_threads"):
        value = getattr(options, name)
        require(value >= 1, f"--{name.replace('_', '-')} is {value}, expected at least 1")
    torch.set_num_threads(options.num_threads)
    script = script_of(options.model, options.script)
    actor, args = load_actor(options.model, None, torch.device("cpu"), script.Actor, script.Args)
    args.num_threads = options.num_threads
    return script, actor, args
