"""The masked networks, losses, n-step returns and whole updates against numbers computed loop by loop.

tests/reference holds pairs NAME.npz, NAME.json; each is tested. The json holds the sizes.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kalei_matd3_mamujoco as script
from experiment.mask_pictures import sparsity

FILES = sorted(Path(__file__).parent.glob("reference/*.npz"))
CLOSE = dict(rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def reference(request):
    """(arrays by name, sizes by name) of one reference file."""
    sizes = json.loads(request.param.with_suffix(".json").read_text())
    with np.load(request.param) as arrays:
        return dict(arrays), sizes


def assert_close(actual, expected, name):
    np.testing.assert_allclose(np.asarray(actual.detach()), expected, **CLOSE, err_msg=name)


def names_in_files(network):
    """The network's parameters by the names of the files."""
    for name, parameter in network.named_parameters():
        kind, index, leaf = name.split(".")
        yield f"{kind.removesuffix('s')}{index}/{leaf}", parameter


def load(network, arrays, prefix):
    with torch.no_grad():
        for name, parameter in names_in_files(network):
            parameter.copy_(torch.as_tensor(arrays[f"{prefix}/{name}"]))
    return network


def masked_network(arrays, prefix, layer_norm):
    masks, hidden, inputs = arrays[f"{prefix}/layer0/thresholds"].shape
    outputs = len(arrays[f"{prefix}/layer2/bias"])
    return load(
        script.MaskedMLP(masks, (inputs, hidden, outputs), "kaleidoscope", (5.0, 5.0), layer_norm), arrays, prefix
    )


@pytest.fixture(params=[False, True], ids=["plain", "layer_norm"])
def masked(request, reference):
    """(network, prefix of its numbers, arrays)."""
    prefix = f"mlp_norm{int(request.param)}"
    return masked_network(reference[0], prefix, request.param), prefix, reference[0]


def test_forward_of_all_masks_at_once(masked):
    network, prefix, arrays = masked
    y = torch.tanh(network(torch.as_tensor(arrays[f"{prefix}/x"]), network.effective_layers()))
    for k, one in enumerate(y):
        assert_close(one, arrays[f"{prefix}/y{k}"], f"y{k}")


def test_forward_takes_an_input_for_each_mask_and_single_masks(masked):
    network, prefix, arrays = masked
    x = torch.as_tensor(arrays[f"{prefix}/x"])
    layers = network.effective_layers()
    y = network(x, layers).detach()
    each = network(torch.stack([x * (k + 1) for k in range(len(y))]), layers)  # (M, B, in) -> (M, B, out)
    for k in range(len(y)):
        alone = network.effective_layers(slice(k, k + 1))
        assert_close(network(x, alone)[0], y[k], f"mask {k} alone")
        assert_close(network(x * (k + 1), alone)[0], each[k].detach(), f"mask {k} on an input of its own")


def test_gradients_of_each_mask(masked):
    network, prefix, arrays = masked
    x, g = (torch.as_tensor(arrays[f"{prefix}/{name}"]) for name in "xg")
    for k in range(len(network.layers[0].thresholds)):
        for layers in (network.effective_layers(), network.effective_layers(slice(k, k + 1))):
            network.zero_grad()
            y = torch.tanh(network(x, layers))
            (y[k if len(y) > 1 else 0] * g).sum().backward()
            for name, parameter in names_in_files(network):
                if name.startswith("layer"):
                    assert_close(parameter.grad, arrays[f"{prefix}/grad{k}/{name}"], f"mask {k}: {name}")


@pytest.mark.parametrize("weighted", [0, 1])
def test_diversity_loss_and_its_gradient(masked, weighted):
    network, prefix, arrays = masked
    loss = script.diversity_loss(network, (1.0, 2.0, 4.0), weighted=bool(weighted))
    assert_close(loss, arrays[f"{prefix}/diversity_weighted{weighted}"], "loss")
    loss.backward()
    for name, parameter in names_in_files(network):
        if name.endswith("thresholds"):
            assert_close(parameter.grad, arrays[f"{prefix}/diversity_weighted{weighted}_grad/{name}"], name)
        else:
            assert parameter.grad is None, f"{name} is a constant of the diversity loss"


def test_sparsity_and_masks(masked):
    network, prefix, arrays = masked
    expected = arrays[f"{prefix}/sparsity_per_mask_per_layer"]
    assert_close(sparsity(network), expected.mean(0), "sparsity")
    zeros = torch.stack([(weight == 0).float().mean((1, 2)) for weight, _ in network.effective_layers()], 1)
    assert_close(zeros, expected, "zeros of the effective weights")
    assert np.array_equal(network.layers[1].masks(), arrays[f"{prefix}/masks_layer1"].astype(bool))


@pytest.mark.parametrize("case", ["partial", "wrapped"])
def test_n_step_returns(reference, case):
    arrays, _ = reference
    stored = {name: arrays[f"nstep_{case}/in/{name}"] for name in ("state", "action", "reward", "done", "term")}
    next_state = arrays[f"nstep_{case}/in/next_state"]
    num_envs, capacity, n_step = arrays["nstep/meta"].tolist()
    gamma = float(arrays["nstep/gamma_discount"])
    shape, size = stored["action"].shape[2:], stored["state"].shape[2]
    replay = script.Replay(capacity // num_envs, num_envs, size, shape, n_step, gamma, torch.device("cpu"))
    for t in range(len(next_state)):
        truncated = stored["done"][t] & ~stored["term"][t]
        step = (stored["state"][t], stored["action"][t], stored["reward"][t], next_state[t], stored["term"][t])
        replay.add([(*step, truncated)])
    expected = {name: arrays[f"nstep_{case}/out/{name}"] for name in (*stored, "next_state", "gamma")}
    slots = torch.arange(len(expected["reward"]))
    assert int(replay.filled) * num_envs == len(slots)
    row, env = slots // num_envs, slots % num_envs
    reward, discount, last = replay.n_step_return(row, env)
    assert_close(reward, expected["reward"][:, 0], "reward")
    assert_close(discount, expected["gamma"][:, 0], "gamma")
    assert np.array_equal(replay.state[row, env], expected["state"])
    assert np.array_equal(replay.actions[row, env], expected["action"])
    assert np.array_equal(replay.next_state[last, env], expected["next_state"])
    assert np.array_equal(replay.terminated[last, env], expected["term"][:, 0])
    assert np.array_equal(replay.ended[last, env], expected["done"][:, 0])


def reference_learner(arrays, sizes):
    """A Learner with the file's sizes, parameters and history lengths."""
    args = script.Args(
        num_critics=sizes["K"],
        hidden_size=sizes["h"][0],
        actor_lr=sizes["lr"],
        critic_lr=sizes["critic_lr"],
        polyak=sizes["polyak"],
        policy_freq=sizes["policy_freq"],
        n_step=sizes["nstep"],
        policy_noise=sizes["policy_noise"],
        actor_diversity_coef=sizes["div_coef"],
        critic_diversity_coef=sizes["critic_div_coef"],
        layer_weights=tuple(sizes["layer_weights"]),
    )
    high = np.ones((sizes["n"], sizes["ad"]), np.float32)
    device = torch.device("cpu")
    learner = script.Learner(sizes["sd"], -high, high, args, device)
    for name in ("actor", "target_actor", "critic", "target_critic"):
        load(getattr(learner, name), arrays, f"update/before/{name}")
    beta, length = args.critic_diversity_coef, sizes["critic_deque_len"]
    learner.critic_coefficient = script.AdaptiveCoefficient(beta, length, device)
    beta, length = args.actor_diversity_coef, sizes["actor_deque_len"]
    learner.actor_coefficient = script.AdaptiveCoefficient(beta, length, device)
    return learner


def reference_batch(arrays, update):
    def get(name):
        return torch.as_tensor(arrays[f"update/batch{update}/{name}"])

    return SimpleNamespace(
        state=get("state"),
        obs=get("obs"),
        actions=get("action"),
        reward=get("reward")[:, 0],
        discount=get("gamma")[:, 0],
        next_state=get("next_state"),
        next_obs=get("next_obs"),
        terminated=get("term")[:, 0],
    )


def test_six_whole_updates(reference):
    arrays, sizes = reference
    learner = reference_learner(arrays, sizes)
    for update in range(1, 7):
        batch = reference_batch(arrays, update - 1)
        logs = learner.update(batch, with_policy=update % sizes["policy_freq"] == 0)
        names = ("losses/critic", "losses/critic_diversity", "losses/critic_total", "coefficients/critic")
        assert_close(torch.stack([logs[name] for name in names]), arrays["update/critic_logs"][update - 1], f"{update}")
        if f"update/after{update}/actor/layer0/weight" not in arrays:
            continue
        for network in ("actor", "target_actor", "critic", "target_critic"):
            for name, parameter in names_in_files(getattr(learner, network)):
                assert_close(parameter, arrays[f"update/after{update}/{network}/{name}"], f"{update} {network} {name}")
    # the ring holds the same losses as the histories, in another order
    losses, diversities = learner.actor_coefficient.losses
    np.testing.assert_allclose(np.sort(losses), np.sort(arrays["update/actor_loss_history"]), **CLOSE)
    np.testing.assert_allclose(np.sort(diversities), np.sort(arrays["update/div_loss_history"]), **CLOSE)
