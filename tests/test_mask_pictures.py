"""What masks share, compared with plain loops; its pictures and how TensorBoard gets them; tools/ that read masks."""

import dataclasses
import io
import math
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3
from experiment import mask_pictures
from experiment.agent_colours import agent_colour
from experiment.checkpoints import write
from experiment.mask_pictures import mask_difference, sparsity
from experiment.saved_models import save_model
from kalei_matd3_mamujoco import MaskedLinear
from tools import masks as script
from tools import metres, one_mask


def network(masks=5, sizes=((9, 6), (6, 3), (3, 1)), bias=0.0, sharing="kaleidoscope"):
    """An object with `layers`; by default, about a third of the weights is masked."""
    torch.manual_seed(0)
    return SimpleNamespace(layers=[MaskedLinear(masks, *size, sharing, 4.0, bias) for size in sizes])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that returns the file of a tiny saved model."""

    def make(algorithm=mappo, **flags):
        torch.manual_seed(0)
        args = algorithm.Args(hidden_size=8, actor_threshold_bias=1.0, **flags)
        if algorithm is mappo:
            args.lr = 1e-3
        else:
            args.policy_freq, args.num_critics = 2, 4
        high, folder = np.ones((3, 2), np.float32), tmp_path_factory.mktemp("model")
        save_model(folder, algorithm.Learner(5, -high, high, args, torch.device("cpu")), 0)
        return folder / "model.pt"

    return make


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs a script in a folder of its own: (exit code, stdout, stderr)."""

    def run_script(*arguments, main=script.main):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_script


# ---- What masks share ----
@pytest.mark.parametrize("masks", [1, 2, 5])
def test_shares_equal_plain_loops_over_masks_and_weights(masks):
    layer = network(masks).layers[0]
    counts, different = [0] * (masks + 1), [[0] * masks for _ in range(masks)]
    for row in range(6):
        for column in range(9):
            kept = []
            for k in range(masks):
                weight = layer.weight[row, column].item()
                kept.append(abs(weight) > 1 / (1 + math.exp(-layer.thresholds[k, row, column].item())))
            counts[sum(kept)] += 1
            for i in range(masks):
                for j in range(masks):
                    different[i][j] += kept[i] != kept[j]
    assert 0 < counts[0] < 54 or masks > 2, "masks that keep all or nothing would test nothing"
    torch.testing.assert_close(mask_pictures.kept_by(layer), torch.tensor(counts) / 54)
    torch.testing.assert_close(mask_pictures.difference_matrix(layer), torch.tensor(different) / 54)


def test_sample_takes_part_of_every_column():
    x = torch.arange(3 * 1_000 * 128).view(3, 1_000, 128)
    sample = mask_pictures.every_kth(x)
    assert 50_000 < len(sample) <= mask_pictures.LARGEST_SAMPLE
    assert torch.equal(torch.unique(sample % 128), torch.arange(128))
    assert torch.equal(mask_pictures.every_kth(x[0]), x[0].flatten()[::3])
    assert torch.equal(mask_pictures.every_kth(x[0, :10]), x[0, :10].flatten())


# ---- Pictures ----
@pytest.mark.parametrize("masks", [1, 2, 5, 17])
def test_panels_show_the_numbers_of_each_layer(masks):
    net = network(masks)
    axes = np.reshape(mask_pictures.draw(net, "actor").axes, (3, 3))
    for layer, (differences, thresholds, kept_by) in zip(net.layers, axes, strict=True):
        matrix = 100 * mask_pictures.difference_matrix(layer).numpy()
        cells, others = differences.images[0].get_array(), ~np.eye(masks, dtype=bool)
        assert np.array_equal(cells.mask, ~others) and np.allclose(cells.data, matrix)
        numbers = [text.get_text() for text in differences.texts if text.get_position()[1] in range(masks)]
        assert numbers == ([f"{x:.1f}" if x else "0" for x in matrix[others]] if masks <= 6 else [])
        assert len(differences.child_axes) == (masks > 6), "a colour bar in the place of numbers"
        shares = 100 * mask_pictures.kept_by(layer).numpy()
        assert np.allclose([bar.get_height() for bar in kept_by.patches], shares)
        (line,) = thresholds.lines
        assert len(thresholds.child_axes) == 1, "a colour bar"
        assert np.array_equal(*line.get_data()) and np.array_equal(line.get_xdata(), thresholds.get_xlim())
        assert thresholds.get_xlim() == thresholds.get_ylim()


def test_layers_share_the_scale_of_each_column():
    axes = np.reshape(mask_pictures.draw(network(), "actor").axes, (3, 3))
    ends = [ax.images[0].get_clim() for ax in axes[:, 0]]
    assert len(set(ends)) == 1 and ends[0][1] == max(ax.images[0].get_array().max() for ax in axes[:, 0])
    assert len({ax.get_xlim() for ax in axes[:, 1]}) == 1
    (end,) = {ax.get_ylim()[1] for ax in axes[:, 2]}
    assert end > max(bar.get_height() for ax in axes[:, 2] for bar in ax.patches)


@pytest.mark.parametrize("masks", [1, 3, 8])
def test_weights_have_the_colours_of_the_masks_that_keep_them(masks):
    net = network(masks)
    *panels, line = (ax.images[0].get_array() for ax in script.draw_weights(net, "actor").axes)
    kept = net.layers[0].masks().numpy()
    assert len(panels) == masks and line.shape == (masks, 6 * 9, 3)
    white, grey = np.ones(3), np.full(3, 0.35)
    for mask, panel in enumerate(panels):
        for pixels in (panel.reshape(-1, 3), line[mask]):
            counts = [np.isclose(pixels, colour).all(1).sum() for colour in (white, grey, agent_colour(mask))]
            assert counts == [(~kept[mask]).sum(), kept.all(0).sum(), (kept[mask] & ~kept.all(0)).sum()]
    assert (np.diff((line < 0.999).any(2).sum(0)) <= 0).all(), "first the weights that most masks keep"
    together = np.sort((np.stack(panels) < 0.999).any(3).reshape(masks, -1).sum(0))
    assert np.array_equal(together, np.sort(kept.sum(0).ravel())), "all panels have the same order"


def test_rows_are_in_groups_of_the_mask_that_drops_them():
    net = network(3, ((9, 6),))
    with torch.no_grad():
        net.layers[0].thresholds.fill_(-100.0)
        for row in range(6):
            net.layers[0].thresholds[row % 3, row, : 3 + row] = 100.0
    *panels, _ = (ax.images[0].get_array() for ax in script.draw_weights(net, "critic").axes)
    dropped = np.stack([(panel == 1).all(2).sum(1) for panel in panels])
    assert dropped.tolist() == [[6, 3, 0, 0, 0, 0], [0, 0, 7, 4, 0, 0], [0, 0, 0, 0, 8, 5]]


@pytest.mark.parametrize("masks", [1, 4, 17])
def test_nothing_is_cut_off_in_the_picture_of_weights(masks):
    figure = script.draw_weights(network(masks, ((393, 128),)), "critic")
    inches = figure.get_tightbbox()
    assert min(inches.min) > 0 and (inches.max < figure.get_size_inches()).all()
    boxes = [ax.get_tightbbox() for ax in figure.axes] + [figure.legends[0].get_window_extent()]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_histogram_counts_every_mask_and_weight_in_its_cell():
    net = network()
    layer, panel = net.layers[0], mask_pictures.draw(net, "actor").axes[1]
    counts, (low, high) = panel.collections[0].get_array(), panel.get_xlim()
    sizes = layer.weight.abs().log10().expand_as(layer.thresholds)
    plain = np.zeros((30, 30), int)
    for pair in zip(layer.thresholds.sigmoid().log10().flatten().tolist(), sizes.flatten().tolist(), strict=True):
        row, column = ((x - low) / (high - low) * 30 for x in pair)
        if row >= 0 and column >= 0:
            plain[min(int(row), 29), min(int(column), 29)] += 1
    assert plain.sum() >= 0.99 * sizes.numel()
    assert np.abs(counts - plain).sum() <= 2, "but for a value on the line between two cells"


@pytest.mark.parametrize("masks", [2, 8, 17])
def test_nothing_is_cut_off_at_the_edges(masks):
    figure = mask_pictures.draw(network(masks, ((393, 256), (256, 1)), bias=2.0), "critic")
    inches = figure.get_tightbbox()
    assert min(inches.min) > 0 and (inches.max < figure.get_size_inches()).all()
    starts = ("sampled weights", "kept by")
    headings = [next(t for t in ax.texts if t.get_text().startswith(starts)) for ax in figure.axes[:3]]
    boxes = [heading.get_window_extent() for heading in headings]
    assert boxes[0].x1 < boxes[1].x0 and boxes[1].x1 < boxes[2].x0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf, 100.0])
def test_odd_weights_and_thresholds_are_drawn(value):
    for name in ("weight", "thresholds"):
        for part in (slice(0, 1), slice(None)):
            odd = network(3, ((9, 6),))
            with torch.no_grad():
                getattr(odd.layers[0], name)[..., part] = value
            figure = mask_pictures.draw(odd, "actor")
            figure.canvas.draw()
            assert figure.axes[1].collections[0].get_array().sum() > 0, "weights in the panel"


def test_drawing_is_repeatable_and_draws_no_random_numbers():
    net = network(4)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    pictures = []
    for _ in range(2):
        canvas = mask_pictures.draw(net, "actor").canvas
        canvas.draw()
        pictures.append(np.array(canvas.buffer_rgba()))
    assert np.array_equal(*pictures)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


def test_matplotlib_waits_for_the_first_picture_and_pyplot_stays_out():
    code = """
        import sys
        from experiment import mask_pictures
        from kalei_matd3_mamujoco import MaskedLinear
        assert "matplotlib" not in sys.modules, "imported with the module"
        class Network:
            layers = [MaskedLinear(2, 3, 4, "kaleidoscope", 4.0, 0.0)]
        mask_pictures.draw(Network, "actor").canvas.draw()
        assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
    """
    folder = Path(mask_pictures.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- TensorBoard ----
def test_log_masks_writes_picture_histograms_and_shares(tmp_path):
    net, state = network(4), torch.get_rng_state()
    with SummaryWriter(tmp_path) as writer:
        mask_pictures.log_masks(writer, SimpleNamespace(actor=net, critic=net), 7)
    assert torch.equal(state, torch.get_rng_state())
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "histograms": 0, "scalars": 0}).Reload()
    layers = [f"layer{i}_{what}" for i in (1, 2, 3) for what in ("thresholds", "weights")]
    for kind, names in (("images", [""]), ("histograms", layers), ("scalars", ["kept_by_none", "kept_by_all"])):
        tags = {f"masks/{name}_{rest}".rstrip("_") for name in ("actor", "critic") for rest in names}
        assert set(events.Tags()[kind]) == tags
    image = events.Images("masks/actor")[0]
    assert (image.step, image.width, image.height) == (7, 1116, 1116)
    picture = Image.open(io.BytesIO(image.encoded_image_string))
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 255, 255)
    histogram = events.Histograms("masks/actor_layer2_thresholds")[0].histogram_value
    exponents = torch.sigmoid(net.layers[1].thresholds).log10()
    assert histogram.num == 4 * 18 and histogram.sum == pytest.approx(exponents.sum().item(), rel=1e-5)
    for rest, count in (("none", 0), ("all", 4)):
        keep = torch.cat([layer.masks().sum(0).flatten() for layer in net.layers])
        (event,) = events.Scalars(f"masks/actor_kept_by_{rest}")
        assert event.step == 7 and event.value == pytest.approx((keep == count).float().mean().item())


@pytest.mark.parametrize("net", [network(sharing="full"), network(sharing="none"), network(bias=1000.0)])
def test_a_network_without_masks_writes_nothing(net):
    writer = SimpleNamespace()  # whatever is called on it fails
    mask_pictures.log_masks(writer, SimpleNamespace(actor=net, critic=net), 0)


# ---- tools/masks.py ----
def test_script_prints_a_table_and_writes_pictures(run, models, tmp_path):
    code, out, err = run(models(matd3), "--out", "pictures", "--scale", 2)
    assert (code, err) == (0, "")
    table, paths = [line.split() for line in out.splitlines()[1:7]], out.splitlines()[7:]
    layers = [[name, str(i), masks] for name, masks in (("actor", "3"), ("critic", "4")) for i in range(1, 4)]
    assert [row[:3] for row in table] == layers
    assert [row[3] for row in table] == ["8x8", "8x8", "2x8", "8x11", "8x8", "1x8"]
    assert paths == [f"pictures_{name}{end}.png" for name in ("actor", "critic") for end in ("_weights", "")]
    assert Image.open(tmp_path / paths[0]).width == 2 * 1116
    for path in paths[1::2]:
        assert Image.open(tmp_path / path).size == (2 * 1116, 2 * 1116)


def test_table_agrees_with_the_network(models, make_learner, tmp_path):
    learner = make_learner()
    save_model(tmp_path, learner, 0)
    for name, saved in script.read_networks(tmp_path / "model.pt").items():
        net = getattr(learner, name)
        table = list(script.table_rows(name, saved))
        assert [float(row[4]) for row in table] == pytest.approx([100 * s for s in sparsity(net).tolist()], abs=0.01)
        sizes = [layer.thresholds[0].numel() for layer in net.layers]
        difference = np.average([float(row[5]) for row in table], weights=sizes)
        assert difference == pytest.approx(100 * mask_difference(net).item(), abs=0.01)


def test_script_draws_no_picture_of_a_network_without_masks(run, models, tmp_path):
    code, out, _ = run(models())  # of MAPPO, whose critic has none
    assert code == 0 and "critic: no masks, no picture" in out
    assert {path.name for path in tmp_path.iterdir()} == {"masks_actor_weights.png", "masks_actor.png"}


@pytest.mark.parametrize(
    "what, complaint",
    [
        ("missing", "No such file"),
        ("folder", "model.pt/model.pt: No such file"),
        ("text", "not as it was written; expected a model that --save-model of this script wrote"),
        ("tensor", "; expected a model that --save-model of this script wrote"),
        ("no layers", "ValueError: no masked layers; expected a model that --save-model of this script wrote"),
        ("full", "without masks, expected one trained with --sharing kaleidoscope"),
        ("none", "without masks, expected one trained with --sharing kaleidoscope"),
        ("out", "expected a place to write to"),
        ("scale", "--scale is 0, expected an integer from 1 to 10"),
        ("flag", "--x is no flag of this script"),
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
    assert code == 2 and (one_line or what == "nothing"), "tyro has its own way to say it"
    assert complaint.lower() in err.lower() and "Traceback" not in out + err


# ---- tools/one_mask.py ----
@pytest.fixture(scope="module", params=[matd3, mappo], ids=["matd3", "mappo"])
def hopper(request, tmp_path_factory):
    """(script, args, environments, actor, file of its model) of an untrained Hopper, whose masks differ a lot."""
    torch.manual_seed(0)
    algorithm, folder = request.param, tmp_path_factory.mktemp("hopper")
    flags = ["--env-id", "Hopper-v2-3x1", "--actor-threshold-bias", "1", "--actor-threshold-scale", "4"]
    args, _ = algorithm.parse_args([*flags, "--hidden-size", "8", "--num-threads", "1"])
    envs = algorithm.make_env(args, 1, 3)
    space = envs.single_action_space
    learner = algorithm.Learner(envs.state_size, space.low, space.high, args, torch.device("cpu"))
    learner.actor.layers[-1].weight.data.mul_(30)  # untrained actions are all about 0 otherwise
    save_model(folder, learner, 0)
    yield algorithm, args, envs, learner.actor, folder / "model.pt"
    envs.close()


def test_one_mask_for_all_is_full_sharing_of_its_weights(hopper, run):
    """The reference: an actor without masks, whose plain weights are what the mask of one agent leaves of W."""
    algorithm, args, envs, actor, path = hopper
    code, out, err = run(path, "--eval-episodes", 3, main=one_mask.main)
    assert (code, err) == (0, "")
    sizes = (actor.layers[0].weight.shape[1], actor.low.numpy(), actor.high.numpy())
    plain = algorithm.Actor(*sizes, dataclasses.replace(args, sharing="full"))
    rest = {name: x for name, x in actor.state_dict().items() if "thresholds" not in name and name != "log_std"}
    plain.load_state_dict(rest, strict=False)  # evaluations do not need log_std
    expected = [algorithm.evaluate(actor, envs, 1)[0]]
    for agent in range(3):
        for layer, masked in zip(plain.layers, actor.layers, strict=True):
            size = masked.weight.abs() - torch.sigmoid(masked.thresholds[agent])
            layer.weight.data = torch.where(size > 0, size * masked.weight.sign(), 0.0)
        expected.append(algorithm.evaluate(plain, envs, 1)[0])
    names = ["each its own", "all agent 0's", "all agent 1's", "all agent 2's"]
    lines = [
        f"{name:>16}  {returns.mean():8.1f} +- {returns.std():.1f}"
        for name, returns in zip(names, expected, strict=True)
    ]
    assert out.splitlines() == lines
    assert len({line[16:] for line in lines}) >= 3, "masks which do not matter would pass whatever the script did"


@pytest.mark.parametrize(
    "what, complaint",
    [
        ("missing", "No such file"),
        ("tensor", "; expected a model that --save-model of this script wrote"),
        ("full", "trained with --sharing full, expected --sharing kaleidoscope"),
        ("none", "trained with --sharing none, expected --sharing kaleidoscope"),
        ("--eval-episodes", "--eval-episodes is 0, expected at least 1"),
        ("--num-threads", "--num-threads is 0, expected at least 1"),
    ],
)
def test_one_mask_answers_bad_input_in_one_line(run, models, tmp_path, what, complaint):
    path, flags = tmp_path / "model.pt", []
    if what == "tensor":
        write(path, torch.zeros(3))
    elif what in ("full", "none"):
        path = models(sharing=what)
    elif what != "missing":
        path, flags = models(), [what, 0]
    code, out, err = run(path, *flags, main=one_mask.main)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and complaint in err


# ---- tools/metres.py ----
def test_metres_are_those_of_episodes_run_one_by_one(hopper, run):
    algorithm, args, envs, actor, path = hopper
    code, out, err = run(path, "--eval-episodes", 3, main=metres.main)
    assert (code, err) == (0, "")
    returns, walked, speeds = [], [], []
    envs.reset(seed=args.seed + 1_000_000)
    starts = envs.task.qpos[:, 0].copy()
    for env in range(3):
        obs, _ = envs.reset(seed=args.seed + 1_000_000)
        total, steps, ended = 0.0, 0, False
        while not ended:
            x = envs.task.qpos[env, 0]
            actions = actor.act(torch.as_tensor(obs), actor.effective_layers()).detach().numpy()
            obs, reward, terminated, truncated, _ = envs.step(actions)
            total, steps, ended = total + reward[env], steps + 1, terminated[env] or truncated[env]
        returns.append(total)
        walked.append(x - starts[env])
        speeds.append(walked[-1] / ((steps - 1) * 0.008))
    lines = {"return": returns, "metres": walked, "metres a second": speeds}
    expected = [f"{name:>16}  {np.mean(x):8.2f} +- {np.std(x):.2f}" for name, x in lines.items()]
    assert out.splitlines() == expected and abs(np.mean(walked)) > 0.01
