"""What the returns owe to the masks: a saved model with each agent's own mask, and with one agent's mask for all.

    python tools/one_mask.py runs/RUN/model.pt

Prints a line for the agents' own masks, and one for each mask with all agents under it: mean and standard deviation
of the returns of deterministic episodes, which start alike in every line. The agents are still told apart by the id in
their observations, and by that alone. Where the lines agree, the masks might as well be one, however much they differ
(tools/masks.py says how much). For models of both scripts.
"""

import dataclasses
import importlib
import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.checkpoints import read, refuse_damage  # noqa: E402
from experiment.command_line import require  # noqa: E402
from experiment.mask_pictures import masks_act  # noqa: E402
from experiment.saved_models import load_actor  # noqa: E402


@dataclasses.dataclass
class Options:
    """Evaluate a saved model with one mask for all agents."""

    model: tyro.conf.Positional[Path]
    """a file that --save-model wrote"""
    eval_episodes: int = 40
    """episodes a line"""
    num_threads: int = 1
    """threads of the processor"""


def script_of(path):
    """The module of the script that wrote a model."""
    with refuse_damage(path, "a model that --save-model wrote"):
        algorithm = "mappo" if "output_gain" in read(path)["args"] else "matd3"
    return importlib.import_module(f"kalei_{algorithm}_mamujoco")


@torch.no_grad()
def put_on(actor, thresholds, agent):
    """Give all agents the mask of one, or, where that is None, each its own. thresholds: (N, out, in) of each layer."""
    for layer, own in zip(actor.layers, thresholds, strict=True):
        layer.thresholds.copy_(own if agent is None else own[agent])


def main():
    options = tyro.cli(Options)
    for name in ("eval_episodes", "num_threads"):
        value = getattr(options, name)
        require(value >= 1, f"--{name.replace('_', '-')} is {value}, expected at least 1")
    torch.set_num_threads(options.num_threads)
    script = script_of(options.model)
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
