"""Pictures and a table of what the masks of a saved model share, for models of both scripts.

    python tools/masks.py runs/RUN/model.pt --out masks

Writes two pictures of each network (see experiment/mask_pictures.py): which weights each mask keeps, in
masks_actor_weights.png and masks_critic_weights.png, and numbers of all layers, in masks_actor.png and
masks_critic.png. Draws no pictures of a network without masks, such as MAPPO's critic.

Prints a line for each layer, in percent: masked weights (mean over masks), weights that only one of two masks keeps
(mean over pairs), weights that no mask keeps, weights that all masks keep.
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.checkpoints import refuse_damage  # noqa: E402
from experiment.code_identity import check_identity  # noqa: E402
from experiment.command_line import fail, require  # noqa: E402
from experiment.mask_pictures import difference_matrix, draw, draw_weights, kept_by, masks_act  # noqa: E402
from experiment.saved_models import EXPECTED, read_model  # noqa: E402
from tools.one_mask import script_of  # noqa: E402


@dataclasses.dataclass
class Options:
    """Show what the masks of a saved model share."""

    model: tyro.conf.Positional[Path]
    """a file that --save-model wrote, or its folder"""
    script: Path | None = None
    """the script that made it; default: the file of that name in the repository"""
    out: Path = Path("masks")
    """beginning of the pictures' names: OUT_actor_weights.png, OUT_actor.png and the same of the critic"""
    scale: int = 2
    """size of the pictures: 1 as in TensorBoard, 2 or 3 for print"""


def masked_layers(state, layer_class):
    """The masked layers of a network, from its state_dict: both scripts name and shape them alike."""
    layers = []
    while f"layers.{len(layers)}.weight" in state:
        prefix = f"layers.{len(layers)}."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        *masks, outputs, inputs = own.get("thresholds", own["weight"]).shape
        sharing = "kaleidoscope" if "thresholds" in own else "none" if masks else "full"
        layer = layer_class(*masks or [1], inputs, outputs, sharing, 0.0, 0.0)
        layer.load_state_dict(own)
        layers.append(layer)
    if not layers:
        raise ValueError("no masked layers")
    return layers


def read_networks(path, script=None):
    """{"actor": network, "critic": network} of a saved model, each with its `layers` only."""
    module, (path, model) = script_of(path, script), read_model(path)
    with refuse_damage(path, EXPECTED):
        layers = {name: masked_layers(model[name], module.MaskedLinear) for name in ("actor", "critic")}
    check_identity(model, module.Args, path)
    return {name: SimpleNamespace(layers=layers[name]) for name in layers}


def table_rows(name, network):
    """One row of text cells per layer."""
    for i, layer in enumerate(network.layers, start=1):
        masks, outputs, inputs = layer.thresholds.shape
        masked = 1 - layer.masks().float().mean()
        different = difference_matrix(layer).sum() / max(masks * (masks - 1), 1)
        shares = (masked, different, *kept_by(layer)[[0, -1]])
        yield [name, str(i), str(masks), f"{outputs}x{inputs}", *(f"{100 * share:.2f}" for share in shares)]


def main():
    options = tyro.cli(Options)
    require(1 <= options.scale <= 10, f"--scale is {options.scale}, expected an integer from 1 to 10")
    networks = read_networks(options.model, options.script)
    masked = {name: network for name, network in networks.items() if masks_act(network)}
    if not masked:
        fail(f"{options.model}: a model without masks, expected one trained with --sharing kaleidoscope")
    table = [["network", "layer", "masks", "out x in", "masked", "difference", "kept by none", "kept by all"]]
    for name, network in masked.items():
        table += table_rows(name, network)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for name, network in networks.items():
        if name not in masked:
            print(f"{name}: no masks, no picture")
            continue
        for drawing, end in ((draw_weights, "_weights"), (draw, "")):
            path = f"{options.out}_{name}{end}.png"
            try:
                figure = drawing(network, name)
                figure.savefig(path, dpi=options.scale * figure.dpi)
            except OSError as error:
                fail(f"--out: {path}: {error.strerror or error}, expected a place to write to")
            print(path)


if __name__ == "__main__":
    main()
