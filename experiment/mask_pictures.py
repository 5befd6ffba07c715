"""Pictures of what masks share: a row a masked layer, for TensorBoard and, larger, for paper.

    python benchmark/masks.py runs/RUN/model.pt --out masks  # of a saved model

    writer = SummaryWriter("runs/RUN")
    log_masks(writer, "actor", learner.actor, global_step)   # in training

A network has `layers`, each with `weight` W, (out, in) or where nothing is shared (M, out, in), `thresholds` s
(M, out, in) and `masks()` (M, out, in) bool, true where mask k keeps a weight: |W| > sigmoid(s_k).

Tensors are reduced on their device, and only small ones come to the host. No random numbers are drawn. Drawing takes
NumPy and Pillow only, which come with tensorboard.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

UNMASKED = -500.0  # thresholds below this mask nothing: their sigmoid is 0
SMALLEST = -12.0  # what is smaller than 10 to this power, 0 included, counts as this power
LARGEST_SAMPLE = 100_000  # values in one of TensorBoard's histograms

# in units of `scale` pixels: side of a panel, left edge of the first, distance to the next, sizes of text
SIDE, LEFT, PITCH, SMALL, NORMAL, LARGE = 240, 70, 370, 11, 13, 17
BLACK, GREY, BAR = (30, 30, 30), (215, 215, 215), (49, 104, 142)
# viridis from light to dark, even steps to the eye and in grey
VIRIDIS = ("fde725", "addc30", "5ec962", "28ae80", "21918c", "2c728e", "3b528b", "472d7b", "440154")
VIRIDIS = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in VIRIDIS], np.float64)


# ---- What masks share ----
def masks_act(network):
    """Whether the network has masks: without (--sharing full or none), all thresholds are about -1000."""
    return any((layer.thresholds > UNMASKED).any().item() for layer in network.layers)


@torch.no_grad()
def sparsity(network):
    """(layers,): each layer's share of zeros among the effective weights of all masks."""
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
    both = masks @ masks.T  # whole numbers, which float32 holds up to 2^24
    kept = both.diagonal()
    return (kept[:, None] + kept - 2 * both) / masks.shape[1]


@torch.no_grad()
def kept_by(layer):
    """(M + 1,): the shares of a layer's weights that exactly 0, 1, ..., M masks keep."""
    masks = layer.masks()
    return torch.bincount(masks.sum(0).flatten(), minlength=len(masks) + 1) / masks[0].numel()


def log_sizes(layer):
    """log10 of |W|, shape of W, and of sigmoid(s), (M, out, in): finite, at least SMALLEST."""
    weights = layer.weight.abs().log10()
    thresholds = F.logsigmoid(layer.thresholds) / math.log(10)
    return tuple(x.nan_to_num(SMALLEST, 38.0).clamp(min=SMALLEST) for x in (weights, thresholds))


def every_kth(x):
    """(at most LARGEST_SAMPLE,): values of x at even distances, in all columns of its last dimension."""
    k = math.ceil(x.numel() / LARGEST_SAMPLE)
    while math.gcd(k, x.shape[-1]) > 1:
        k += 1
    return x.flatten()[::k]


def whole_decades(x):
    """(low, high): the powers of ten around the values x of log10, but for the smallest 0.2 %."""
    low, high = torch.stack([every_kth(x).quantile(0.002), x.max()]).tolist()
    return math.floor(low), max(math.ceil(high), math.floor(low) + 1)


def joint_histogram(x, y, bins):
    """Of x (out, in) or (M, out, in) and y (M, out, in): counts (bins of y, bins of x), and the ranges of x and y."""
    (left, right), (bottom, top) = ranges = whole_decades(x), whole_decades(y)
    column = ((x - left) * (bins / (right - left))).floor().clamp(max=bins - 1)
    row = ((y - bottom) * (bins / (top - bottom))).floor().clamp(max=bins - 1)
    index = torch.where((column >= 0) & (row >= 0), row * bins + column, bins**2).long()
    counts = torch.bincount(index.flatten(), minlength=bins**2 + 1)[:-1]
    return counts.view(bins, bins).cpu().numpy(), *ranges


# ---- Drawing ----
def viridis(x):
    """Colours (..., 3) uint8 of numbers from 0, light, to 1, dark."""
    at = np.clip(x, 0, 1) * (len(VIRIDIS) - 1)
    return np.stack([np.interp(at, range(len(VIRIDIS)), c) for c in VIRIDIS.T], -1).round().astype(np.uint8)


def round_up(x):
    """The end of an axis that starts at 0 and holds x."""
    power = 10 ** math.floor(math.log10(max(x, 0.1)))
    return next(end for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if (end := power * step) >= x * (1 - 1e-6))


def percent(x):
    """A share as text, short enough for a cell."""
    return "0" if x == 0 else "<0.1" if x < 5e-4 else f"{100 * x:.1f}"


font = functools.cache(ImageFont.load_default)  # of a size


class Canvas:
    """A white picture on which lengths are in units of `scale` pixels."""

    def __init__(self, width, height, scale):
        self.scale = scale
        self.image = Image.new("RGB", (width * scale, height * scale), "white")
        self.drawing = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=SMALL, anchor="mm", fill=BLACK, halo=0):
        place, options = (x * self.scale, y * self.scale), dict(stroke_width=halo * self.scale, stroke_fill="white")
        self.drawing.text(place, text, fill, font(size * self.scale), anchor, **options)

    def axis_titles(self, left, top, across, up):
        """Below a panel, and turned on its left."""
        self.text(left + SIDE / 2, top + SIDE + 30, across, NORMAL)
        face, height = font(NORMAL * self.scale), (NORMAL + 5) * self.scale
        width = math.ceil(face.getlength(up))
        strip = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(strip).text((width / 2, height / 2), up, BLACK, face, "mm")
        x, y = (left - 48) * self.scale - height // 2, (top + SIDE // 2) * self.scale - width // 2
        self.image.paste(strip.rotate(90, expand=True), (x, y))

    def power_of_ten(self, x, y, exponent, anchor):
        """10^exponent, centred at x or ending there ("r"), written out since the font has no small digits."""
        ten, small = (font(size * self.scale).getlength(s) for size, s in ((SMALL, "10"), (9, str(exponent))))
        x -= (ten + small) / self.scale * (1 if anchor == "r" else 0.5)
        self.text(x, y, "10", anchor="lm")
        self.text(x + ten / self.scale, y - 4, str(exponent), 9, "lm")

    def line(self, points, fill=BLACK, width=1):
        self.drawing.line([(x * self.scale, y * self.scale) for x, y in points], fill, width * self.scale)

    def box(self, left, top, right, bottom, fill=None, outline=None):
        ends = (left, top, right, bottom)
        self.drawing.rectangle([round(end * self.scale) for end in ends], fill, outline, self.scale)

    def cells(self, left, top, width, height, colors):
        """Colours (rows, columns, 3) as a grid of that size, in a frame."""
        grid = Image.fromarray(np.ascontiguousarray(colors))
        size = (width * self.scale, height * self.scale)
        self.image.paste(grid.resize(size, Image.Resampling.NEAREST), (left * self.scale, top * self.scale))
        self.box(left, top, left + width, top + height, outline=BLACK)

    def color_bar(self, left, top, labels):
        """The colours from 0, at the bottom, to 1, with labels at even distances."""
        self.cells(left, top, 10, SIDE, viridis(np.linspace(1, 0, SIDE))[:, None])
        for i, label in enumerate(labels):
            y = top + SIDE * (1 - i / (len(labels) - 1))
            self.line([(left + 10, y), (left + 13, y)])
            self.text(left + 16, y, label, anchor="lm")


def labelled(count):
    """Which of `count` things along a side to label, so that labels have 13 units each."""
    return range(0, count, math.ceil(13 * count / SIDE))


def draw_differences(canvas, left, top, matrix):
    """Heat map of (M, M) in percent; grey where a mask meets itself."""
    m = len(matrix)
    end = round_up(100 * matrix.max()) / 100
    colors = viridis(matrix / end)
    colors[range(m), range(m)] = GREY
    canvas.cells(left, top, SIDE, SIDE, colors)
    middle = (np.arange(m) + 0.5) * SIDE / m
    for i in range(m if m <= 8 else 0):
        for j in set(range(m)) - {i}:
            fill = "white" if colors[i, j] @ (0.3, 0.59, 0.11) < 130 else BLACK
            canvas.text(left + middle[j], top + middle[i], percent(matrix[i, j]), NORMAL if m < 6 else SMALL, fill=fill)
    for i in labelled(m):
        canvas.text(left + middle[i], top + SIDE + 10, str(i))
        canvas.text(left - 6, top + middle[i], str(i), anchor="rm")
    canvas.axis_titles(left, top, "mask", "mask")
    canvas.color_bar(left + SIDE + 10, top, [f"{100 * end * share:.3g} %" for share in (0, 0.5, 1)])


def draw_thresholds(canvas, left, top, counts, across, up):
    """2-D histogram, and the diagonal on which a weight is just kept; across, up: the axes' ranges in decades."""
    most = counts.max()
    colors = viridis(np.log(np.maximum(counts, 1)) / math.log(max(most, 2)))
    colors[counts == 0] = 255
    canvas.cells(left, top, SIDE, SIDE, colors[::-1])

    def place(x, y):
        x, y = (x - across[0]) / (across[1] - across[0]), (y - up[0]) / (up[1] - up[0])
        return left + SIDE * x, top + SIDE * (1 - y)

    start, end = max(across[0], up[0]), min(across[1], up[1])
    if start < end:
        canvas.line([place(start, start), place(end, end)], "white", 4)
        canvas.line([place(start, start), place(end, end)], BLACK, 2)
    if across[0] < up[1]:
        canvas.text(left + 7, top + 13, "masked", NORMAL, "lm", halo=2)
    if up[0] < across[1]:
        canvas.text(left + SIDE - 7, top + SIDE - 13, "kept", NORMAL, "rm", halo=2)
    for exponent in range(across[0], across[1] + 1, math.ceil((across[1] - across[0]) / 6)):
        x, _ = place(exponent, up[0])
        canvas.line([(x, top + SIDE), (x, top + SIDE + 4)])
        canvas.power_of_ten(x, top + SIDE + 14, exponent, "m")
    for exponent in range(up[0], up[1] + 1, math.ceil((up[1] - up[0]) / 10)):
        _, y = place(across[0], exponent)
        canvas.line([(left - 4, y), (left, y)])
        canvas.power_of_ten(left - 7, y, exponent, "r")
    canvas.axis_titles(left, top, "|W|", "sigmoid(s)")
    canvas.color_bar(left + SIDE + 10, top, ["1", f"{most:,}"])


def draw_kept_by(canvas, left, top, shares):
    """Bars of (M + 1,) in percent."""
    end = round_up(100 * shares.max()) / 100
    width, height, bottom = SIDE / len(shares), SIDE - 18, top + SIDE  # room for numbers above the bars
    for tick in np.linspace(0, 1, 6):
        y = bottom - height * tick
        canvas.line([(left, y), (left + SIDE, y)], GREY)
        canvas.line([(left - 4, y), (left, y)])
        canvas.text(left - 7, y, f"{100 * end * tick:.3g}", anchor="rm")
    for i, share in enumerate(shares):
        y = bottom - height * share / end
        canvas.box(left + (i + 0.15) * width, y, left + (i + 0.85) * width, bottom, BAR)
        if len(shares) <= 9:  # on white, since lines of the grid pass behind
            canvas.text(left + (i + 0.5) * width, y - 8, percent(share), halo=2)
    canvas.box(left, top, left + SIDE, bottom, outline=BLACK)
    for i in labelled(len(shares)):
        canvas.text(left + (i + 0.5) * width, bottom + 10, str(i))
    canvas.axis_titles(left, top, "masks that keep a weight", "share of weights, %")


@torch.no_grad()
def draw(network, name, scale=1):
    """Picture of all masked layers, uint8 (H, W, 3), a row each; `scale` multiplies its pixels, for paper."""
    row_height, first_row, num_masks = SIDE + 85, 70, len(network.layers[0].thresholds)
    canvas = Canvas(3 * PITCH, first_row + row_height * len(network.layers), scale)
    canvas.text(LEFT, 18, f"{name}, {num_masks} mask{'s' if num_masks > 1 else ''}", LARGE, "lm")
    headings = ("weights that only one of two masks keeps", "weights of all masks by size and threshold")
    headings += ("weights by number of masks that keep them",)
    for column, heading in enumerate(headings):
        canvas.text(LEFT + PITCH * column, 46, heading, NORMAL, "lm")
    for i, layer in enumerate(network.layers):
        top, shares = first_row + row_height * i + 24, kept_by(layer).cpu().numpy()
        masked = percent(shares @ np.arange(num_masks, -1, -1) / num_masks)
        outputs, inputs = layer.thresholds.shape[1:]
        title = f"layer {i + 1}: {inputs} inputs, {outputs} output{'s' if outputs > 1 else ''}, {masked} % masked"
        canvas.text(LEFT, top - 12, title, NORMAL, "lm")
        draw_differences(canvas, LEFT, top, difference_matrix(layer).cpu().numpy())
        bins = 60 if layer.thresholds.numel() > 20_000 else 30
        draw_thresholds(canvas, LEFT + PITCH, top, *joint_histogram(*log_sizes(layer), bins))
        draw_kept_by(canvas, LEFT + 2 * PITCH, top, shares)
    return np.asarray(canvas.image)


# ---- TensorBoard ----
@torch.no_grad()
def log_masks(writer, name, network, step):
    """Write the picture, each layer's thresholds and weights as histograms of log10, and two shares of weights.

    Writes nothing for a network without masks, where all thresholds are below UNMASKED.
    """
    if not masks_act(network):
        return
    writer.add_image(f"masks/{name}", draw(network, name), step, dataformats="HWC")
    none = every = total = 0
    for i, layer in enumerate(network.layers, start=1):
        for what, values in zip(("weights", "thresholds"), log_sizes(layer), strict=True):
            writer.add_histogram(f"masks/{name}_layer{i}_{what}", every_kth(values), step, bins=60)
        shares, size = kept_by(layer).tolist(), layer.thresholds[0].numel()
        none, every, total = none + shares[0] * size, every + shares[-1] * size, total + size
    writer.add_scalar(f"masks/{name}_kept_by_none", none / total, step)
    writer.add_scalar(f"masks/{name}_kept_by_all", every / total, step)
