"""What the returns owe to the masks: a saved model with each agent's own mask, and with one agent's mask for all.

    python tools/one_mask.py runs/RUN/model.pt

Prints a line for the agents' own masks, and a line for each mask with all agents wearing it: mean and standard
deviation of the returns of deterministic episodes, which start alike in every line. Then only the id in its
observations tells an agent who it is. If the lines agree, one mask would do as well, however much the masks differ
(tools/masks.py says how much). For models of both scripts and of their copies.
"""

import dataclasses
import importlib
import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.checkpoints import refuse_damage  # noqa: E402
from experiment.code_identity import ROOT  # noqa: E402
from experiment.command_line import check_flag_names, require  # noqa: E402
from experiment.mask_pictures import masks_act  # noqa: E402
from experiment.saved_models import EXPECTED, load_actor, read_model  # noqa: E402


@dataclasses.dataclass
class Options:
    """Evaluate a saved model with one mask for all agents."""

    model: tyro.conf.Positional[Path]
    """a file that --save-model wrote, or its folder"""
    script: Path | None = None
    """the script that made it; default: the file of that name in the repository"""
    eval_episodes: int = 40
    """episodes per line"""
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


@torch.no_grad()
def put_on(actor, thresholds, agent):
    """Give all agents the mask of `agent` or, if it is None, each its own. thresholds: for each layer (N, out, in)."""
    for layer, own in zip(actor.layers, thresholds, strict=True):
        layer.thresholds.copy_(own if agent is None else own[agent])


def main():
    options = tyro.cli(Options, args=check_flag_names(None, Options))
    for name in ("eval_episodes", "num_threads"):
        value = getattr(options, name)
        require(value >= 1, f"--{name.replace('_', '-')} is {value}, expected at least 1")
    torch.set_num_threads(options.num_threads)
    script = script_of(options.model, options.script)
    actor, args = load_actor(options.model, None, torch.device("cpu"), script.Actor, script.Args)
    mode = args.sharing
    require(masks_act(actor), f"{options.model}: trained with --sharing {mode}, expected --sharing kaleidoscope")
    args.num_threads = options.num_threads
    thresholds = [layer.thresholds.clone() for layer in actor.layers]
    envs = script.make_env(args, args.seed, options.eval_episodes)
    for agent in (None, *range(len(thresholds[0]))):
        put_on(actor, thresholds, agent)
        returns, _ = script.evaluate(actor, envs, args.seed)
        name = "each its own" if agent is None else f"all agent {agent}'s"
        print(f"{name:>16}  {returns.mean():8.1f} +- {returns.std():.1f}", flush=True)
    envs.close()


if __name__ == "__main__":
    main()
