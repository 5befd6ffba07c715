"""--precision: what it resolves to, what is in bfloat16 and what stays in float32, gradients, exactness."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3
from benchmark import emulate_bfloat16
from benchmark.gradient_precision import compare, mappo_update, matd3_update

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"matd3": matd3, "mappo": mappo}
CPU = torch.device("cpu")
AGENTS, ACT, STATE, HIDDEN = 3, 2, 7, 16
each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


@pytest.fixture(autouse=True)
def matmul_precision():
    """Puts the process's own setting back, which resolve_precision changes."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def make_learner(script, precision, sharing="kaleidoscope", seed=0, **changes):
    torch.manual_seed(seed)
    settings = dict(hidden_size=HIDDEN, actor_threshold_bias=1.0, precision=precision, sharing=sharing)
    if script is matd3:
        settings |= dict(num_critics=3, policy_freq=2, n_step=3)
    else:
        settings |= dict(rollout_steps=6, num_epochs=2, num_minibatches=2, clip=0.2, entropy_coef=0.01, lr=1e-3)
        settings |= dict(lr_schedule="constant", num_envs=4, output_gain=0.5)
    high = np.linspace(0.5, 1.5, AGENTS * ACT, dtype=np.float32).reshape(AGENTS, ACT)
    return script.Learner(STATE, -high, 2 * high, script.Args(**settings | changes), CPU)


def make_batch(script, rows=24, seed=0):
    """A batch of MATD3 or a Rollout of MAPPO of as many rows, a multiple of 4, drawn at random."""
    torch.manual_seed(seed)
    if script is mappo:
        rollout = mappo.Rollout(rows // 4, 4, STATE, (AGENTS, ACT), CPU)
        for name in ("state", "next_state", "actions", "reward"):
            getattr(rollout, name).normal_()
        rollout.terminated.bernoulli_(0.2)
        return rollout
    obs = torch.randn(2, rows, AGENTS, STATE + AGENTS)
    return SimpleNamespace(
        state=torch.randn(rows, STATE),
        obs=obs[0],
        actions=torch.rand(rows, AGENTS, ACT) - 0.5,
        reward=torch.randn(rows),
        discount=torch.full((rows,), 0.97),
        next_state=torch.randn(rows, STATE),
        next_obs=obs[1],
        terminated=torch.rand(rows) < 0.2,
    )


def update(script, learner, seed=0):
    """A whole update with draws of its own; returns its logs."""
    batch = make_batch(script, seed=seed)
    return learner.update(batch, True) if script is matd3 else learner.update(batch)


# ---- What it resolves to ----
def set_processor(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@each_script
@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True), (True, True)])
def test_auto_is_bfloat16_where_the_cpu_has_it_and_tf32_on_a_gpu(script, avx512, amx, monkeypatch, capsys):
    set_processor(monkeypatch, avx512, amx)
    assert script.resolve_precision("auto", "cpu") == ("bfloat16" if avx512 or amx else "float32")
    assert torch.get_float32_matmul_precision() == "highest"
    assert script.resolve_precision("auto", "cuda") == "tf32"
    assert torch.get_float32_matmul_precision() == "high"
    assert capsys.readouterr().err == ""


@each_script
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("native", [True, False])
def test_what_is_asked_for_is_kept_with_a_warning_where_it_is_slow(
    script, precision, device, native, monkeypatch, capsys
):
    set_processor(monkeypatch, native, False)
    torch.set_float32_matmul_precision("highest" if precision == "tf32" else "high")
    assert script.resolve_precision(precision, device) == precision
    assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
    lines = capsys.readouterr().err.splitlines()
    if precision == "bfloat16" and device == "cpu" and not native:
        assert len(lines) == 1 and lines[0].startswith("warning: ") and "--precision bfloat16" in lines[0]
    else:
        assert lines == []


@each_script
@pytest.mark.parametrize("native", [True, False])
def test_the_command_line_resolves_auto(script, native, monkeypatch):
    set_processor(monkeypatch, native, False)
    args, _ = script.parse_args(["--env-id", "Hopper-v2-3x1", "--device", "cpu"])
    assert args.precision == ("bfloat16" if native and script is matd3 else "float32"), "MAPPO's has to be asked for"
    args, _ = script.parse_args(["--evaluate", "model.pt", "--device", "cpu"])
    assert args.precision == "auto", "a model has a precision of its own"


# ---- What is in bfloat16 ----
class Bfloat16(TorchDispatchMode):
    """Notes which operations take or return bfloat16, and of each product its shapes and dtype."""

    def __init__(self):
        super().__init__()
        self.operations, self.products = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        name = func.overloadpacket.__name__
        if any(x.dtype == torch.bfloat16 for x in tensors):
            self.operations.add(f"{name} to {result.dtype}".replace("torch.", ""))
        if "mm" in name:
            self.products.append((tuple(result.shape), result.dtype))
        return result


@each_script
@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
def test_a_whole_update_has_bfloat16_in_products_and_casts_only(script, sharing):
    learner = make_learner(script, "bfloat16", sharing)
    with Bfloat16() as seen:
        logs = update(script, learner)
    products = {"bmm to bfloat16", "_to_copy to bfloat16", "_to_copy to float32"}
    biases = {"add to float32"}  # of a product and a float32 bias, which takes bfloat16 as it is
    views = {f"{name} to bfloat16" for name in ("expand", "transpose", "view", "_unsafe_view", "slice", "unsqueeze")}
    assert products <= seen.operations <= products | biases | views, seen.operations
    # the output layers' products and those of their gradients have a side of their outputs: ACT actions or 1 value
    for shape, dtype in seen.products:
        if not {ACT, 1}.isdisjoint(shape[1:]):
            assert dtype == torch.float32, shape
    dtypes = [dtype for _, dtype in seen.products]
    assert torch.bfloat16 in dtypes and torch.float32 in dtypes
    tensors = [*learner.parameters(), *learner.buffers(), *logs.values()]
    tensors += [x for optimizer in learner.optimizers for state in optimizer.state.values() for x in state.values()]
    tensors += [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
    assert {x.dtype for x in tensors if x.is_floating_point()} == {torch.float32}


@each_script
@pytest.mark.parametrize("sharing", ["kaleidoscope", "none"])
def test_hidden_weights_are_rounded_and_the_output_layers_are_those_of_float32(script, sharing):
    exact, rounded = (make_learner(script, precision, sharing) for precision in ("float32", "bfloat16"))
    x = torch.randn(5, STATE + AGENTS)
    for name in ("actor", "critic"):
        layers = {}
        for learner in (exact, rounded):
            layers[learner] = getattr(learner, name).effective_layers()
        for (weight, bias), (rounded_weight, rounded_bias) in zip(*layers.values(), strict=True):
            assert torch.equal(bias, rounded_bias) and bias.dtype == weight.dtype == torch.float32
            if rounded_weight is layers[rounded][-1][0] or (script is mappo and name == "critic"):
                assert torch.equal(weight, rounded_weight) and rounded_weight.dtype == torch.float32
            else:
                assert torch.equal(weight.bfloat16(), rounded_weight) and rounded_weight.dtype == torch.bfloat16
        weight, bias = layers[rounded][-1]
        x = torch.randn(len(weight), 5, HIDDEN)
        assert torch.equal(script.masked_linear(x, weight, bias), script.masked_linear(x, *layers[exact][-1]))


def test_tf32_is_float32_to_the_networks():
    for script in SCRIPTS.values():
        with Bfloat16() as seen:
            update(script, make_learner(script, "tf32"))
        assert seen.operations == set()


def test_what_mappo_prepares_stays_float32():
    batch, known = make_learner(mappo, "bfloat16").prepare(make_batch(mappo))
    for name, value in (vars(batch) | known).items():
        assert value.dtype == torch.float32, name


@each_script
@pytest.mark.parametrize("shared_input", [True, False])
def test_a_bfloat16_product_rounds_its_operands_and_its_result(script, shared_input):
    torch.manual_seed(0)
    masks, rows, inputs, outputs = 3, 5, 40, 6
    x = torch.randn(rows, inputs) if shared_input else torch.randn(masks, rows, inputs)
    weight, bias = torch.randn(masks, outputs, inputs), torch.randn(outputs)
    result = script.masked_linear(x, weight.bfloat16(), bias)
    assert result.dtype == torch.float32
    products = torch.zeros(masks, rows, outputs)
    for mask in range(masks):
        for row in range(rows):
            for output in range(outputs):
                a = (x if shared_input else x[mask])[row].bfloat16().double()
                products[mask, row, output] = (a * weight[mask, output].bfloat16().double()).sum().bfloat16()
    # sums in float32 may round the other way where they are near the middle between two bfloat16, and these have 8 bits
    # and lie 2**-7 of their value apart at most; the bias adds a rounding of float32 each
    error = (result - (products + bias)).abs()
    assert (error <= 2.0**-7 * products.abs() + 1e-6).all()
    assert (error <= 1e-6).float().mean() > 0.95, "float32 sums are seldom near a middle"
    assert not torch.allclose(result, script.masked_linear(x, weight, bias), rtol=1e-4), "nothing was rounded"


def product_and_gradients(left, right):
    """left (M, B, in), right (M, out, in) -> their product and its square sum's gradients, all in bfloat16."""
    left, right = (x.clone().requires_grad_() for x in (left, right))
    product = left @ right.mT
    product.float().square().sum().backward()
    return product.detach(), left.grad, right.grad


def test_the_emulation_rounds_what_pytorch_rounds_and_leaves_float32_alone(monkeypatch):
    torch.manual_seed(0)
    left, right = torch.randn(3, 40, 64), torch.randn(3, 24, 64)
    exact = torch.bmm(left, right.mT)
    left, right = left.bfloat16(), right.bfloat16()
    native = product_and_gradients(left, right)
    own, dtypes = emulate_bfloat16.bmm, []
    monkeypatch.setattr(emulate_bfloat16, "bmm", lambda *operands: dtypes.append(operands[0].dtype) or own(*operands))
    kept = emulate_bfloat16.emulate()
    emulated = product_and_gradients(left, right)
    assert dtypes == [torch.bfloat16] * 3, "a product and two gradients"
    for value, expected in zip(emulated, native, strict=True):
        assert value.dtype == expected.dtype == torch.bfloat16
        assert (value != expected).float().mean() < 0.005, "sums in another order seldom round the other way"
        error = (value.double() - expected.double()).abs()
        assert (error <= 2.0**-7 * expected.double().abs() + 1e-6 * expected.abs().max()).all(), "by one step at most"
    # the first, in loops over agents and float64, from the same rounded operands
    for number in range(3):
        plain = left[number].double() @ right[number].double().T
        assert (emulated[0][number] == plain.bfloat16()).float().mean() > 0.99
    torch.manual_seed(0)
    assert torch.equal(torch.bmm(torch.randn(3, 40, 64), torch.randn(3, 24, 64).mT), exact)
    del kept
    product_and_gradients(left, right)
    assert len(dtypes) == 4, "PyTorch's own product is back"


def test_the_emulation_runs_a_script(tmp_path):
    command = [sys.executable, ROOT / "benchmark" / "emulate_bfloat16.py"]
    run = subprocess.run([*command, "kalei.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: the first argument is kalei.py; it must be the script to run\n"
    flags = ["--num-threads", "1", "--env-id", "Hopper-v2-3x1", "--total-timesteps", "40", "--num-envs", "4"]
    flags += ["--rollout-steps", "10", "--num-minibatches", "2", "--eval-episodes", "0", "--precision", "bfloat16"]
    run = subprocess.run([*command, mappo.__file__, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "error" not in run.stderr and len(list((tmp_path / "runs").iterdir())) == 1


# ---- Is it good enough, and exact ----
@each_script
def test_gradients_in_bfloat16_are_far_closer_to_float64_than_two_batches(script):
    learner = make_learner(script, "float32", hidden_size=32)
    for seed in range(10, 13):
        update(script, learner, seed)
    batches = [make_batch(script, 200, seed) for seed in range(4)]
    fields = [vars(batch) for batch in batches]
    rows = compare(learner, matd3_update if script is matd3 else mappo_update, fields)
    assert {network for network, _ in rows} == {"actor", "critic"} and len(rows) > 15
    for name, row in rows.items():
        (exact, _), (error, cosine) = row["float32"], row["bfloat16"]
        assert 1000 * exact < error < 0.25, (name, row)
        assert cosine > 0.99, (name, row)


@each_script
def test_bfloat16_is_deterministic_and_no_float32(script):
    states = {}
    for precision in ("bfloat16", "bfloat16 again", "float32"):
        learner = make_learner(script, precision.split()[0])
        for seed in range(4):
            update(script, learner, seed)
        states[precision] = learner.state_dict()
    for name, value in states["bfloat16"].items():
        assert torch.equal(value, states["bfloat16 again"][name]), name
    moved = [name for name in states["float32"] if name.endswith("layers.0.weight")]
    assert len(moved) == (4 if script is matd3 else 2)
    for name in moved:
        same = torch.equal(states["bfloat16"][name], states["float32"][name])
        assert same == (script is mappo and name.startswith("critic")), f"{name}: MAPPO's critic stays in float32"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
def test_the_first_ratio_of_mappo_is_exactly_1(precision, sharing):
    learner = make_learner(mappo, precision, sharing, num_minibatches=1)
    rollout = make_batch(mappo, 400)
    for _ in range(2):  # the second rollout after updates
        batch, _ = learner.prepare(rollout)
        first = learner.update_actor(batch, slice(None))
        assert first["losses/approx_kl"].item() == 0.0 and first["losses/clipfrac"].item() == 0.0
        assert learner.update_actor(batch, slice(None))["losses/approx_kl"].item() > 0, "the step changed nothing"


# ---- Runs ----
FLAGS = "--env-id Hopper-v2-3x1 --device cpu --num-threads 1 --seed 3 --num-envs 4 --hidden-size 16"
FLAGS += " --eval-episodes 0 --log-interval 40 --total-timesteps 320 --checkpoint-interval 160 --save-model"
FLAGS = {
    matd3: f"{FLAGS} --warmup-steps 80 --batch-size 16 --buffer-size 240 --train-interval 10 --updates-per-round 4"
    " --num-critics 2",
    mappo: f"{FLAGS} --rollout-steps 10 --num-epochs 2 --num-minibatches 2 --precision bfloat16",
}


def run(script, folder, flags, copy_at=None, copy=None):
    """main() in a folder, which is copied as it is at the start of the update of that number: the run's folder."""
    own, count = script.Learner.update, 0

    def update(*arguments):
        nonlocal count
        count += 1
        if count == copy_at:
            shutil.copytree(folder, copy)
        return own(*arguments)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", [script.__file__, *flags])
            patch.setattr(script.Learner, "update", update)
            script.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    (run_folder,) = (folder / "runs").iterdir()
    return run_folder


@each_script
def test_a_run_in_bfloat16_that_is_killed_goes_on_in_the_same_bits(script, tmp_path, monkeypatch, capsys):
    """A copy of the folder of a run under way is what a kill leaves."""
    set_processor(monkeypatch, True, False)
    flags = FLAGS[script].split()
    for name in ("whole", "float32"):
        (tmp_path / name).mkdir()
    # two updates after those up to the checkpoint at step 160
    whole = run(script, tmp_path / "whole", flags, 11 if script is matd3 else 6, tmp_path / "killed")  # auto
    other = run(
        script,
        tmp_path / "float32",
        [*FLAGS[script].replace("--precision bfloat16", "").split(), "--precision", "float32"],
    )
    (killed,) = (tmp_path / "killed" / "runs").iterdir()
    assert torch.load(killed / "checkpoint.pt")["counters"][0] == 160
    assert torch.load(whole / "checkpoint.pt")["counters"][0] == 320
    set_processor(monkeypatch, False, False)  # resumed on another machine
    capsys.readouterr()
    assert run(script, tmp_path / "killed", ["--resume", str(killed)]) == killed
    assert "warning: this CPU does not multiply bfloat16 natively" in capsys.readouterr().err
    models = [torch.load(folder / "model.pt") for folder in (whole, killed, other)]
    assert [model["args"]["precision"] for model in models] == ["bfloat16", "bfloat16", "float32"]
    assert not torch.equal(models[0]["actor"]["layers.0.weight"], models[2]["actor"]["layers.0.weight"])
    ends = [torch.load(folder / "checkpoint.pt") for folder in (whole, killed)]
    assert {end["counters"][0] for end in ends} == {320}
    for name, value in ends[0]["learner"].items():
        assert torch.equal(value, ends[1]["learner"][name]), name
