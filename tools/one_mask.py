"""How much a model needs its masks: its returns with each agent's own mask, and with one agent's mask for all.

    python tools/one_mask.py runs/RUN/model.pt

Prints a line for the agents' own masks, and a line for each mask with all agents wearing it: mean and standard
deviation of the returns of deterministic episodes, which start alike in every line. With one mask for all, agents
differ only by the id in their observations. If the lines agree, one mask would do as well, however much the masks
differ (tools/masks.py says how much). For models of both scripts and of their copies.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.command_line import check_flag_names, require  # noqa: E402
from experiment.mask_pictures import masks_act  # noqa: E402
from tools.models import EvaluationOptions, open_model  # noqa: E402


@dataclasses.dataclass
class Options(EvaluationOptions):
    """Evaluate a saved model with one mask for all agents."""


@torch.no_grad()
def put_on(actor, thresholds, agent):
    """Give all agents the mask of `agent` or, if it is None, each its own. thresholds: for each layer (N, out, in)."""
    for layer, own in zip(actor.layers, thresholds, strict=True):
        layer.thresholds.copy_(own if agent is None else own[agent])


def main():
    options = tyro.cli(Options, args=check_flag_names(None, Options))
    script, actor, args = open_model(options)
    mode = args.sharing
    require(masks_act(actor), f"{options.model}: trained with --sharing {mode}, expected --sharing kaleidoscope")
    envs = script.make_env(args, args.seed, options.eval_episodes)
    thresholds = [layer.thresholds.clone() for layer in actor.layers]
    for agent in (None, *range(len(thresholds[0]))):
        put_on(actor, thresholds, agent)
        returns, _ = script.evaluate(actor, envs, args.seed)
        name = "each its own" if agent is None else f"all agent {agent}'s"
        print(f"{name:>16}  {returns.mean():8.1f} +- {returns.std():.1f}", flush=True)
    envs.close()


if __name__ == "__main__":
    main()
