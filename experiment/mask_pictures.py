"""Pictures of masks, for TensorBoard and for tools/masks.py: what each mask keeps of the shared weights.

A network has `layers`. Each layer has `weight` W (out, in), `thresholds` s (M, out, in) or None, and `masks()`
(M, out, in) bool, True where mask k keeps a weight: |W| > sigmoid(s_k).

Tensors are reduced on their device, so only small ones come to the host. Nothing here draws random numbers.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

NO_MASK_BELOW = -500.0  # thresholds below this mask nothing: their sigmoid is 0
SMALLEST = -12.0  # numbers below 10 to this power, 0 included, are drawn as 10 to this power
LARGEST_SAMPLE = 100_000  # values in a histogram


# ---- What masks share ----
def masks_act(network):
    """Whether the network has masks. In older models without masks, all thresholds are about -1000."""
    thresholds = [layer.thresholds for layer in network.layers if layer.thresholds is not None]
    return any((each > NO_MASK_BELOW).any().item() for each in thresholds)


@torch.no_grad()
def sparsity(network):
    """(layers,): the share of each layer's effective weights, over all masks, that is 0."""
    return torch.stack([1 - layer.masks().float().mean() for layer in network.layers])


@torch.no_grad()
def mask_difference(network):
    """The share of weights that one mask keeps and another drops, averaged over pairs of masks."""
    differing = pairs = 0
    for layer in network.layers:
        n, keep = len(layer.thresholds), layer.masks().sum(0)
        differing += (2 * keep * (n - keep)).sum()
        pairs += n * (n - 1) * keep.numel()
    return differing / max(pairs, 1)


@torch.no_grad()
def difference_matrix(layer):
    """(M, M): the share of a layer's weights that one mask keeps and the other drops."""
    masks = layer.masks().flatten(1).float()
    both = masks @ masks.T  # whole numbers; float32 is exact up to 2^24
    kept = both.diagonal()
    return (kept[:, None] + kept - 2 * both) / masks.shape[1]


@torch.no_grad()
def kept_by(layer):
    """(M + 1,): the share of a layer's weights that exactly 0, 1, ..., M masks keep."""
    masks = layer.masks()
    return torch.bincount(masks.sum(0).flatten(), minlength=len(masks) + 1) / masks[0].numel()


@torch.no_grad()
def log_sizes(layer):
    """log10 |W| in the shape of W, and log10 sigmoid(s), (M, out, in); all finite and at least SMALLEST."""
    weights = layer.weight.abs().log10()
    thresholds = F.logsigmoid(layer.thresholds) / math.log(10)
    return tuple(x.nan_to_num(SMALLEST, 38.0).clamp(min=SMALLEST) for x in (weights, thresholds))


def every_kth(x):
    """(at most LARGEST_SAMPLE,): values of x at even distances, from all columns of its last dimension."""
    k = math.ceil(x.numel() / LARGEST_SAMPLE)
    while math.gcd(k, x.shape[-1]) > 1:
        k += 1
    return x.flatten()[::k]


# ---- Drawing ----
def new_figure(width, height):
    """An empty matplotlib Figure of this size in inches. `savefig` writes it, larger with a higher dpi than 120."""
    # import here: it takes a second. Not pyplot, which looks for a screen and keeps every figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=120)
    FigureCanvasAgg(figure)
    return figure


def percent(share):
    """A share as text, short enough for a cell."""
    return "0" if share == 0 else "<0.1" if share < 5e-4 else f"{100 * share:.1f}"


def draw_differences(ax, matrix, end):
    """Heat map of (M, M) up to `end` percent, with numbers or, if cells are too small for them, a colour bar."""
    cells = np.ma.array(100 * matrix, mask=np.eye(len(matrix), dtype=bool))
    ax.set_facecolor("lightgrey")  # where a mask meets itself
    image = ax.imshow(cells, cmap="viridis_r", vmin=0, vmax=end, aspect="auto")
    if len(matrix) > 6:
        ax.figure.colorbar(image, cax=ax.inset_axes((1.03, 0, 0.04, 1)), ticks=(0, end / 2, end), format="%.2f")
    else:
        for i, j in np.argwhere(~cells.mask):
            color = "white" if cells[i, j] > end / 2 else "black"
            ax.text(j, i, percent(matrix[i, j]), color=color, ha="center", va="center")
    ax.locator_params(integer=True, nbins=9)
    ax.set(xlabel="mask", ylabel="mask")


def draw_thresholds(ax, sizes, thresholds, low, high):
    """2-D histogram of log10 |W| and log10 sigmoid(s), (n,) each; weights on or above the diagonal are masked."""
    bins = 60 if len(sizes) > 20_000 else 30
    *_, image = ax.hist2d(sizes, thresholds, bins, range=[(low, high)] * 2, norm="log", vmin=1, cmap="viridis_r")
    ax.figure.colorbar(image, cax=ax.inset_axes((1.03, 0, 0.04, 1)))
    ax.plot((low, high), (low, high), "black")
    for x, y, text, anchor in ((0.04, 0.93, "masked", "left"), (0.96, 0.07, "kept", "right")):
        ax.text(x, y, text, ha=anchor, va="center", transform=ax.transAxes, bbox=dict(color="white", pad=1))
    ax.locator_params(integer=True, nbins=5)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("$10^{{{x:.0f}}}$")
    ax.set(xlabel="|W|", ylabel="sigmoid(s)")


def draw_kept_by(ax, shares, end):
    """Bars of (M + 1,) in percent, on an axis up to `end` percent."""
    bars = ax.bar(range(len(shares)), 100 * shares)
    if len(shares) <= 6:
        ax.bar_label(bars, map(percent, shares), padding=1)
    ax.margins(x=0.02)
    ax.set_ylim(0, 1.15 * end)
    ax.locator_params("x", integer=True, nbins=9)
    ax.set(xlabel="masks that keep a weight", ylabel="share of weights, %")


@torch.no_grad()
def draw(network, name):
    """A matplotlib Figure of all masked layers, a row each. The axes of a column have the same scale in all rows."""
    layers, num_masks = network.layers, len(network.layers[0].thresholds)
    width, height = 9.3, 0.9 + 2.8 * len(layers)  # inches
    figure = new_figure(width, height)
    edges = dict(left=0.07, right=0.98, bottom=0.6 / height, top=1 - 1.15 / height, wspace=0.5, hspace=0.55)
    axes = figure.subplots(len(layers), 3, squeeze=False, gridspec_kw=edges)
    title = f"{name}, {num_masks} mask{'s' if num_masks > 1 else ''}"
    figure.text(0.02, 1 - 0.3 / height, title, size="x-large")
    headings = ("kept by one of two masks, %", "sampled weights in a cell", "kept by how many masks")
    for ax, heading in zip(axes[0], headings, strict=True):
        ax.text(0, 1.2, heading, transform=ax.transAxes, size="large")

    matrices = [difference_matrix(layer).cpu().numpy() for layer in layers]
    kept = [kept_by(layer).cpu().numpy() for layer in layers]
    points = []  # (n,) and (n,) of each layer
    for layer in layers:
        sizes, thresholds = log_sizes(layer)
        points.append([every_kth(x).cpu().numpy() for x in (sizes.expand_as(thresholds), thresholds)])
    low = math.floor(min(np.quantile(x, 0.002) for pair in points for x in pair))
    high = max(math.ceil(max(x.max() for pair in points for x in pair)), low + 1)
    end = max(100 * max(matrix.max() for matrix in matrices), 0.1)
    for i, (layer, row) in enumerate(zip(layers, axes, strict=True)):
        masked = percent(kept[i] @ np.arange(num_masks, -1, -1) / num_masks)
        outputs, inputs = layer.thresholds.shape[1:]
        title = f"layer {i + 1}: {inputs} inputs, {outputs} output{'s' if outputs > 1 else ''}, {masked} % masked"
        row[0].text(0, 1.06, title, transform=row[0].transAxes)
        draw_differences(row[0], matrices[i], end)
        draw_thresholds(row[1], *points[i], low, high)
        draw_kept_by(row[2], kept[i], 100 * max(shares.max() for shares in kept))
    return figure


# ---- TensorBoard ----
def masked_networks(learner):
    """[(name, network)] of the learner's networks that have masks."""
    networks = (("actor", learner.actor), ("critic", learner.critic))
    return [(name, network) for name, network in networks if masks_act(network)]


def log_mask_shares(writer, learner, step):
    """Write each masked layer's share of zeros, and the share of weights that one mask keeps and another drops."""
    for name, network in masked_networks(learner):
        for layer, share in enumerate(sparsity(network).tolist(), start=1):
            writer.add_scalar(f"masks/{name}_sparsity_layer{layer}", share, step)
        writer.add_scalar(f"masks/{name}_difference", mask_difference(network).item(), step)


@torch.no_grad()
def log_masks(writer, learner, step):
    """Write a picture of each network with masks, histograms of log_sizes, and shares that no and all masks keep."""
    for name, network in masked_networks(learner):
        canvas = draw(network, name).canvas
        canvas.draw()
        writer.add_image(f"masks/{name}", np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")
        for i, layer in enumerate(network.layers, start=1):
            for what, values in zip(("weights", "thresholds"), log_sizes(layer), strict=True):
                writer.add_histogram(f"masks/{name}_layer{i}_{what}", every_kth(values), step, bins=60)
        keep = torch.cat([layer.masks().sum(0).flatten() for layer in network.layers])
        for who, count in (("none", 0), ("all", len(network.layers[0].thresholds))):
            writer.add_scalar(f"masks/{name}_kept_by_{who}", (keep == count).float().mean().item(), step)
