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

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.agent_colours import agent_colour  # noqa: E402
from experiment.checkpoints import refuse_damage  # noqa: E402
from experiment.code_identity import check_identity  # noqa: E402
from experiment.command_line import check_flag_names, fail, require  # noqa: E402
from experiment.mask_pictures import draw, kept_by, mask_difference, masks_act, new_figure, sparsity  # noqa: E402
from experiment.saved_models import EXPECTED, read_model  # noqa: E402
from tools.models import ModelOptions, script_of  # noqa: E402

KEPT_BY_ALL = (0.35,) * 3  # grey


@dataclasses.dataclass
class Options(ModelOptions):
    """Show what the masks of a saved model share."""

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
        alone = SimpleNamespace(layers=[layer])
        shares = (*sparsity(alone), mask_difference(alone), *kept_by(layer)[[0, -1]])
        yield [name, str(i), str(masks), f"{outputs}x{inputs}", *(f"{100 * share:.2f}" for share in shares)]


@torch.no_grad()
def draw_weights(network, name):
    """A matplotlib Figure of the first layer: which of its weights each mask keeps.

    Above, the layer once for each mask, rows and columns sorted: each mask in turn has a group of rows, of which it
    drops more than the other masks do. Below, all weights of the layer in a line, beginning with what most masks keep.
    """
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    masks = network.layers[0].masks().cpu().numpy()
    num_masks, outputs, inputs = masks.shape
    who, count = "agent" if name == "actor" else name, masks.sum(0)  # (out, in)
    colours = [agent_colour(mask) for mask in range(num_masks)]
    image = np.where(masks[..., None], np.reshape(colours, (num_masks, 1, 1, 3)), 1.0)  # (M, out, in, 3)
    image[:, count == num_masks] = KEPT_BY_ALL
    kept = masks.sum(2) / np.maximum(masks.sum((1, 2)), 1)[:, None]  # (M, out)
    rows, columns = np.lexsort((kept.min(0), kept.argmin(0))), np.argsort(-count.sum(0), kind="stable")

    across, strip = min(num_masks, 6), 0.3 * num_masks  # all lengths in inches
    side = 9.0 / across
    above = 0.95 + -(-num_masks // across) * (side + 0.4)
    width, height = 9.3, above + strip + 1.1
    figure = new_figure(width, height)
    title = f"{name}, first layer: {inputs} inputs (columns), {outputs} outputs (rows)"
    figure.text(0.15 / width, 1 - 0.3 / height, title, size="x-large", va="center")
    own = tuple(Patch(color=colour) for colour in colours[:4])
    labels = {f"kept by all {who}s": Patch(color=KEPT_BY_ALL), f"kept by this {who}, not by all": own}
    labels["dropped"] = Patch(facecolor="white", edgecolor="black")
    place = dict(loc="center left", bbox_to_anchor=(0.06 / width, 1 - 0.65 / height), ncols=3, frameon=False)
    figure.legend(labels.values(), labels, handler_map={tuple: HandlerTuple(None, 0)}, fontsize="large", **place)

    def add_image(pixels, left, top, wide, high, **options):
        ax = figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))
        ax.imshow(pixels, aspect="auto", interpolation="nearest", **options)
        return ax

    for mask in range(num_masks):
        row, column = divmod(mask, across)
        top = 0.95 + row * (side + 0.4) + 0.35
        ax = add_image(image[mask][rows][:, columns], 0.15 + column * side, top, side - 0.12, side)
        ax.set(xticks=(), yticks=())
        ax.set_title(f"{who} {mask}", size="large")
    order = np.lexsort((*~masks.reshape(num_masks, -1)[::-1], -count.ravel()))
    line = image.reshape(num_masks, -1, 3)[:, order]
    ax = add_image(line, 1.0, above + 0.3, 8.0, strip, extent=(0, 100, num_masks - 0.5, -0.5))
    ax.set_yticks(range(num_masks), [f"{who} {i}" for i in range(num_masks)], size="large")
    ax.tick_params(labelsize="large")
    ax.set_xlabel(f"all weights of this layer, %, beginning with what most {who}s keep", size="large")
    return figure


def main():
    options = tyro.cli(Options, args=check_flag_names(None, Options))
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
