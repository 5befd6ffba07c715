"""Updates, acting, storing, resets and logged values on the meta device, which has shapes and no values.

What waits for the device raises there, as .item() does, and so does what mixes devices. PyTorch lets some of that pass
on the meta device, as products with a CPU tensor: a mode that sees every operation refuses it here.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3
from experiment.mask_pictures import mask_difference, sparsity

SCRIPTS = {"matd3": matd3, "mappo": mappo}
META = torch.device("meta")
AGENTS, ACT, STATE, ENVS, STEPS = 3, 2, 7, 4, 6
COLUMNS = np.array([[0, 3, -1], [1, 2, 6], [4, 5, -1]])
each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


class OneDevice(TorchDispatchMode):
    """Raises where an operation takes tensors of two devices, but for copies from one to the other."""

    COPIES = ("_to_copy", "copy_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if len(devices) > 1 and func.overloadpacket.__name__ not in self.COPIES:
            raise RuntimeError(f"{func}: {[(x.device.type, tuple(x.shape)) for x in tensors]}, expected one device")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def plain_adam(monkeypatch):
    """Adam that is not fused, which the meta device lacks, and holds learning rates as numbers, as that one must."""
    adam = torch.optim.Adam

    def make(parameters, lr=1e-3, **options):
        parameters = list(parameters)
        if isinstance(parameters[0], dict):
            parameters = [group | {"lr": torch.tensor(1e-3)} for group in parameters]
        return adam(parameters, lr=lr, foreach=False)

    monkeypatch.setattr(torch.optim, "Adam", make)


def make_learner(script, sharing="kaleidoscope", precision="float32", columns=None):
    settings = dict(hidden_size=16, sharing=sharing, precision=precision, num_envs=ENVS)
    if script is matd3:
        settings |= dict(num_critics=3, policy_freq=2, n_step=3, batch_size=12)
    else:
        settings |= dict(rollout_steps=STEPS, num_epochs=1, clip=0.2, entropy_coef=0.01, lr=1e-3, lr_schedule="linear")
        settings |= dict(num_minibatches=2)
    high = np.ones((AGENTS, ACT), dtype=np.float32)
    return script.Learner(STATE, -high, high, script.Args(**settings), META, columns)


def make_steps(count):
    """Steps as the environment and the acting make them."""
    rng = np.random.default_rng(0)
    state = rng.normal(size=(2, ENVS, STATE)).astype(np.float32)
    actions = rng.normal(size=(ENVS, AGENTS, ACT)).astype(np.float32)
    ends = rng.random((2, ENVS)) < 0.2
    return [(state[0], actions, rng.normal(size=ENVS), state[1], *ends) for _ in range(count)]


def act(script, learner):
    """A step of acting as in main, up to the copy to the host."""
    actor = learner.actor
    width = actor.layers[0].weight.shape[-1]
    obs = torch.as_tensor(np.zeros((ENVS, AGENTS, width), np.float32), device=META)
    with torch.no_grad():
        layers = actor.effective_layers()
        if script is mappo:
            actions = actor.to_bounds(actor.sample(obs, layers, actor.std()))
        else:
            actions = actor.act(obs, layers)
            actions = torch.clamp(actions + torch.randn_like(actions) * actor.scale * 0.1, actor.low, actor.high)
        return actions, actor.act(obs, layers)


def train(script, learner, columns=None):
    """A round of all that a run does on the device. Returns what is logged."""
    for actions in act(script, learner):
        assert actions.shape == (ENVS, AGENTS, ACT) and actions.device == META
    if script is matd3:
        replay = matd3.Replay(10, ENVS, STATE, (AGENTS, ACT), 3, 0.99, META, columns)
        for _ in range(2):  # wraps
            replay.add(make_steps(STEPS))
        logs = learner.update(replay.sample(12), with_policy=True)
    else:
        rollout = mappo.Rollout(STEPS, ENVS, STATE, (AGENTS, ACT), META)
        rollout.store(make_steps(STEPS))
        learner.scale_learning_rates(0.5)
        logs = learner.update(rollout)
    if script is matd3:
        script.reset_critic(learner.critic, 1)
        logs |= learner.gradient_norms()
    if learner.actor.masked:
        logs["reset"] = script.reset_actor(learner.actor, 0.5)
    for network in filter(lambda network: network.masked, (learner.actor, learner.critic)):
        logs |= {f"{network} sparsity": sparsity(network), f"{network} difference": mask_difference(network)}
    return logs


@each_script
@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
@pytest.mark.parametrize(("precision", "columns"), [("float32", None), ("bfloat16", COLUMNS)], ids=["all", "columns"])
def test_nothing_waits_for_the_device_or_leaves_it(script, sharing, precision, columns):
    learner = make_learner(script, sharing, precision, columns)
    assert {x.device for x in [*learner.parameters(), *learner.buffers()]} == {META}
    with OneDevice():
        logs = train(script, learner, columns)
    assert {value.device for value in logs.values()} == {META}


# ---- The test itself can fail ----
def make_faulty(script, monkeypatch, fault):
    """Puts a fault into the diversity loss, which every update goes through."""
    own = script.diversity_loss

    def faulty(network, *arguments):
        loss = own(network, *arguments)
        return fault(loss, network)

    monkeypatch.setattr(script, "diversity_loss", faulty)


@each_script
@pytest.mark.parametrize(
    "fault",
    [
        lambda loss, network: loss * loss.item(),
        lambda loss, network: loss if loss > 0 else -loss,
        lambda loss, network: loss.cpu().to(META),
        lambda loss, network: loss + network.layers[0].bias[network.layers[0].bias > 0].sum(),
        lambda loss, network: (loss + torch.zeros(3)).sum(),
    ],
    ids=["item", "if", "cpu", "boolean index", "sum with a CPU tensor"],
)
def test_what_waits_or_mixes_devices_raises_by_itself(script, fault, monkeypatch):
    make_faulty(script, monkeypatch, fault)
    with pytest.raises((RuntimeError, NotImplementedError)):
        train(script, make_learner(script))


@each_script
@pytest.mark.parametrize(
    "fault",
    [
        lambda loss, network: loss + (network.layers[1].bias @ torch.zeros(16)),
        lambda loss, network: loss + network.layers[1].bias[torch.arange(2)].sum(),
        lambda loss, network: loss * torch.ones(()),
    ],
    ids=["product with a CPU tensor", "CPU index", "CPU scalar"],
)
def test_the_mode_catches_what_the_meta_device_lets_pass(script, fault, monkeypatch):
    make_faulty(script, monkeypatch, fault)
    with OneDevice(), pytest.raises(RuntimeError, match="expected one device"):
        train(script, make_learner(script))
