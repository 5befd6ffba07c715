"""What masks share against plain loops, the pictures of it, their place in TensorBoard, and benchmark/masks.py."""

import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import kalei_mappo_mamujoco as mappo
from benchmark import masks as script
from experiment import mask_pictures
from experiment.checkpoints import write
from experiment.mask_pictures import mask_difference, sparsity
from experiment.saved_models import save_model
from kalei_matd3_mamujoco import MaskedLinear


def network(masks=5, sizes=((9, 6), (6, 3), (3, 1)), bias=0.0, own=False):
    """Whatever has `layers`: here a third of the weights is masked."""
    torch.manual_seed(0)
    return SimpleNamespace(layers=[MaskedLinear(masks, *size, 4.0, bias, own) for size in sizes])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that returns the file of a tiny saved MAPPO model."""

    def make(**flags):
        torch.manual_seed(0)
        args = mappo.Args(hidden_size=8, lr=1e-3, actor_threshold_bias=1.0, **flags)
        high = np.ones((3, 2), np.float32)
        path = tmp_path_factory.mktemp("model") / "model.pt"
        save_model(path, mappo.Learner(5, -high, high, args, torch.device("cpu")), 0)
        return path

    return make


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs the script in a folder of its own: (exit code, stdout, stderr)."""

    def run_script(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["masks.py", *map(str, arguments)])
        code = 0
        try:
            script.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_script


# ---- What masks share ----
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("masks", [1, 2, 5])
def test_shares_equal_plain_loops_over_masks_and_weights(masks, own):
    layer = network(masks, own=own).layers[0]
    counts, different = [0] * (masks + 1), [[0] * masks for _ in range(masks)]
    for row in range(6):
        for column in range(9):
            kept = []
            for k in range(masks):
                weight = (layer.weight[k] if own else layer.weight)[row, column].item()
                kept.append(abs(weight) > 1 / (1 + math.exp(-layer.thresholds[k, row, column].item())))
            counts[sum(kept)] += 1
            for i in range(masks):
                for j in range(masks):
                    different[i][j] += kept[i] != kept[j]
    assert 0 < counts[0] < 54 or masks > 2, "masks that keep all or nothing would test nothing"
    torch.testing.assert_close(mask_pictures.kept_by(layer), torch.tensor(counts) / 54)
    torch.testing.assert_close(mask_pictures.difference_matrix(layer), torch.tensor(different) / 54)


@pytest.mark.parametrize("own", [False, True])
def test_histogram_counts_every_mask_and_weight_in_its_cell(own):
    layer = network(own=own).layers[0]
    x, y = mask_pictures.log_sizes(layer)
    counts, across, up = mask_pictures.joint_histogram(x, y, 10)
    for values, (low, high) in ((x, across), (y, up)):
        assert high - 1 <= values.max() <= high and low <= values.quantile(0.002) < low + 1
    plain = np.zeros((10, 10), int)
    for a, b in zip(x.expand_as(y).flatten().tolist(), y.flatten().tolist(), strict=True):
        column, row = ((v - low) / (high - low) * 10 for v, (low, high) in ((a, across), (b, up)))
        if column >= 0 and row >= 0:
            plain[min(int(row), 9), min(int(column), 9)] += 1
    assert np.abs(counts - plain).sum() <= 2, "but for a value on the line between two cells"


def test_sample_takes_part_of_every_column():
    x = torch.arange(3 * 1_000 * 128).view(3, 1_000, 128)
    sample = mask_pictures.every_kth(x)
    assert 50_000 < len(sample) <= mask_pictures.LARGEST_SAMPLE
    assert torch.equal(torch.unique(sample % 128), torch.arange(128))
    assert torch.equal(mask_pictures.every_kth(x[0]), x[0].flatten()[::3])
    assert torch.equal(mask_pictures.every_kth(x[0, :10]), x[0, :10].flatten())


@pytest.mark.parametrize("x, end", [(0, 0.1), (0.3, 0.3), (7, 8), (97.6, 100), (100, 100), (11, 15)])
def test_axes_end_at_a_round_number(x, end):
    assert mask_pictures.round_up(x) == pytest.approx(end)


# ---- Pictures ----
@pytest.mark.parametrize("masks", [1, 2, 4, 9, 17, 40])
def test_picture_has_three_panels_a_layer(masks):
    picture = mask_pictures.draw(network(masks), "actor")
    assert picture.dtype == np.uint8 and picture.shape == (70 + 3 * 325, 3 * 370, 3)
    for row in range(3):
        for column in range(3):
            panel = picture[94 + 325 * row :, 70 + 370 * column :][:240, :240].reshape(-1, 3)
            assert len(np.unique(panel, axis=0)) >= (2 if masks == 1 else 3), f"layer {row + 1}, column {column + 1}"


def test_scale_multiplies_the_pixels():
    one, three = (mask_pictures.draw(network(4), "actor", scale).astype(float) for scale in (1, 3))
    assert three.shape == (3 * one.shape[0], 3 * one.shape[1], 3)
    small = three.reshape(one.shape[0], 3, one.shape[1], 3, 3).mean((1, 3))
    assert np.abs(small - one).mean() < 5


@pytest.mark.parametrize("value", [0.0, 1e-30, math.nan, math.inf, -math.inf, 100.0, -100.0])
def test_odd_weights_and_thresholds_are_drawn(value):
    for name in ("weight", "thresholds"):
        for part in (slice(0, 1), slice(None)):
            odd = network(3)
            with torch.no_grad():
                getattr(odd.layers[0], name)[..., part] = value
            assert len(np.unique(mask_pictures.draw(odd, "actor"))) > 10


def test_drawing_is_repeatable_and_draws_no_random_numbers():
    net = network(4)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = mask_pictures.draw(net, "actor")
    assert np.array_equal(first, mask_pictures.draw(net, "actor"))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


# ---- TensorBoard ----
def test_log_masks_writes_picture_histograms_and_shares(tmp_path):
    net, state = network(4), torch.get_rng_state()
    with SummaryWriter(tmp_path) as writer:
        for name in ("actor", "critic"):
            mask_pictures.log_masks(writer, name, net, 7)
    assert torch.equal(state, torch.get_rng_state())
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "histograms": 0, "scalars": 0}).Reload()
    layers = [f"layer{i}_{what}" for i in (1, 2, 3) for what in ("thresholds", "weights")]
    for kind, names in (("images", [""]), ("histograms", layers), ("scalars", ["kept_by_none", "kept_by_all"])):
        tags = {f"masks/{name}_{rest}".rstrip("_") for name in ("actor", "critic") for rest in names}
        assert set(events.Tags()[kind]) == tags
    image = events.Images("masks/actor")[0]
    assert (image.step, image.width, image.height) == (7, 1110, 1045)
    histogram = events.Histograms("masks/actor_layer2_thresholds")[0].histogram_value
    exponents = torch.sigmoid(net.layers[1].thresholds).log10()
    assert histogram.num == 4 * 18 and histogram.sum == pytest.approx(exponents.sum().item(), rel=1e-5)
    for rest, count in (("none", 0), ("all", 4)):
        keep = torch.cat([layer.masks().sum(0).flatten() for layer in net.layers])
        (event,) = events.Scalars(f"masks/actor_kept_by_{rest}")
        assert event.step == 7 and event.value == pytest.approx((keep == count).float().mean().item())


@pytest.mark.parametrize("own", [False, True])
def test_a_network_without_masks_writes_nothing(own):
    writer = SimpleNamespace()  # whatever is called on it fails
    mask_pictures.log_masks(writer, "actor", network(bias=mappo.UNMASKED, own=own), 0)


# ---- benchmark/masks.py ----
def test_script_prints_a_table_and_writes_pictures(run, models, tmp_path):
    code, out, err = run(models(num_critics=2), "--out", "pictures", "--scale", 1)
    assert (code, err) == (0, "")
    table, paths = [line.split() for line in out.splitlines()[1:9]], out.splitlines()[9:]
    assert [row[:2] for row in table] == [[name, str(i)] for name in ("actor", "critic") for i in range(1, 5)]
    assert [row[3] for row in table] == ["8x8", "8x8", "8x8", "2x8", "8x5", "8x8", "8x8", "1x8"]
    assert paths == ["pictures_actor.png", "pictures_critic.png"]
    for path in paths:
        assert Image.open(tmp_path / path).size == (1110, 1370)


def test_table_agrees_with_the_network(models, make_learner, tmp_path):
    learner = make_learner()
    save_model(tmp_path / "model.pt", learner, 0)
    for name, saved in script.read_networks(tmp_path / "model.pt").items():
        net = getattr(learner, name)
        table = list(script.table_rows(name, saved))
        assert [float(row[4]) for row in table] == pytest.approx([100 * s for s in sparsity(net).tolist()], abs=0.01)
        sizes = [layer.thresholds[0].numel() for layer in net.layers]
        difference = np.average([float(row[5]) for row in table], weights=sizes)
        assert difference == pytest.approx(100 * mask_difference(net).item(), abs=0.01)


def test_script_draws_no_picture_of_a_network_without_masks(run, models, tmp_path):
    code, out, _ = run(models())  # a single critic
    assert code == 0 and "critic: no masks, no picture" in out
    assert [path.name for path in tmp_path.iterdir()] == ["masks_actor.png"]


@pytest.mark.parametrize(
    "what, complaint",
    [
        ("missing", "No such file"),
        ("folder", "Is a directory"),
        ("text", "not as it was written; expected a model that --save-model wrote"),
        ("tensor", "; expected a model that --save-model wrote"),
        ("no layers", "ValueError: no masked layers; expected a model that --save-model wrote"),
        ("full", "without masks, expected one trained with --sharing kaleidoscope"),
        ("none", "without masks, expected one trained with --sharing kaleidoscope"),
        ("out", "expected a place to write to"),
        ("scale", "--scale is 0, expected an integer from 1 to 10"),
        ("flag", "Unrecognized"),
        ("nothing", "required"),
    ],
)
def test_script_answers_bad_input_without_a_traceback(run, models, tmp_path, what, complaint):
    path, flags = tmp_path / "model.pt", []
    if what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("not a model")
    elif what == "tensor":
        write(path, torch.zeros(3))
    elif what == "no layers":
        write(path, {"actor": {}, "critic": {}})
    elif what in ("full", "none"):
        path = models(sharing=what)
    elif what != "missing":
        path = models()
        flags = {"out": ["--out", "no/folder"], "scale": ["--scale", "0"], "flag": ["--x"]}.get(what, [])
    code, out, err = run(*([] if what == "nothing" else [path, *flags]))
    one_line = err.startswith("error: ") and err.count("\n") == 1
    assert code == 2 and (one_line or what in ("flag", "nothing")), "tyro has its own way to say it"
    assert complaint.lower() in err.lower() and "Traceback" not in out + err
