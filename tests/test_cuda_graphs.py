"""Updates as one launch against the same updates called one by one.

Without a GPU, a stand-in for CUDA graphs records an update's operations on the CPU and does them again on the same
memory. What it cannot show is what CUDA itself asks of a graph; where there is a GPU, the same tests run on it.
"""

import contextlib
import copy
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3
from experiment import checkpoints
from experiment.run_folder import NoWriter
from kalei_matd3_mamujoco import GraphedUpdate

STATE, AGENTS, ACT, ENVS = 7, 3, 2, 4
# operations that wait for the device or copy from the host's memory, which no graph may do
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")


def tensors(tree):
    return [value for value in tree_flatten(tree)[0] if isinstance(value, torch.Tensor)]


def storages(tree):
    return [tensor.untyped_storage() for tensor in tensors(tree)]


class Recorder(TorchDispatchMode):
    """Notes all operations on tensors, and keeps what they would have changed."""

    def __init__(self):
        super().__init__()
        self.operations, self.kept, self.made = [], {}, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name == "lift_fresh":
            assert args[0].dim() == 0, "copies from the host; a single number goes along with the launch"
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), (
                "its result's size is not known"
            )
        for position, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                for storage in storages(written):
                    if storage.data_ptr() not in self.made:
                        self.kept.setdefault(storage.data_ptr(), (storage, storage.clone()))
        results = operation(*args, **kwargs)
        new = [returned.alias_info is None for returned in operation._schema.returns]
        outputs = results if isinstance(results, (tuple, list)) and len(new) > 1 else [results]
        own = tensors([value for value, is_new in zip(outputs, new, strict=False) if is_new])
        self.made |= {storage.data_ptr() for storage in storages(own)}
        self.operations.append((operation, args, kwargs, own, new))
        return results

    def restore(self):
        for storage, before in self.kept.values():
            storage.copy_(before)


class GraphOnTheCPU:
    """As torch.cuda.CUDAGraph does, recording changes nothing, and a replay writes to the memory of the recording."""

    count = 0

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, own, new in self.operations:
            results = operation(*args, **kwargs)
            outputs = results if isinstance(results, (tuple, list)) and len(new) > 1 else [results]
            fresh = tensors([value for value, is_new in zip(outputs, new, strict=False) if is_new])
            for old, value in zip(own, fresh, strict=True):
                old.detach().copy_(value)
        GraphOnTheCPU.count += 1


@contextlib.contextmanager
def record(graph):
    random, recorder = torch.get_rng_state(), Recorder()
    with recorder:
        yield
    torch.set_rng_state(random)
    with torch.no_grad():
        recorder.restore()
    graph.operations = recorder.operations


@pytest.fixture
def device(monkeypatch):
    """A GPU, or the CPU with the stand-in."""
    GraphOnTheCPU.count = 0
    if torch.cuda.is_available():
        replay = torch.cuda.CUDAGraph.replay

        def count(graph):
            GraphOnTheCPU.count += 1
            replay(graph)

        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
        return torch.device("cuda")
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", GraphOnTheCPU)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return torch.device("cpu")


CALLS_BEFORE_RECORDING = 3


def launcher(function, device, cudagraph=True):
    """A GraphedUpdate that takes the CPU, with the stand-in, for a GPU."""
    return GraphedUpdate(function, torch.device("cuda") if device.type == "cpu" else device, cudagraph, compile=False)


def same(a, b):
    assert list(a) == list(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def draw_step():
    """One step of all environments, of normal numbers: state, actions, reward, next_state, terminated, truncated."""
    ends = torch.rand(ENVS).numpy() < 0.1
    state, next_state = torch.randn(2, ENVS, STATE).numpy()
    return state, torch.randn(ENVS, AGENTS, ACT).numpy(), torch.randn(ENVS).numpy(), next_state, ends, ends & False


# ---- GraphedUpdate ----
def test_a_graph_goes_on_where_the_calls_before_it_ended(device):
    total, noise = torch.zeros(3, device=device), torch.zeros(3, device=device)

    def function():
        noise.copy_(torch.rand_like(noise))
        total.add_(noise)
        return {"total": total * 1, "noise": noise}

    torch.manual_seed(0)
    expected = [{name: value.clone() for name, value in function().items()} for _ in range(9)]
    total.zero_()
    torch.manual_seed(0)
    launch = launcher(function, device)
    got = [{name: value.clone() for name, value in launch().items()} for _ in range(9)]
    assert all(map(same, got, expected))
    assert GraphOnTheCPU.count == 9 - CALLS_BEFORE_RECORDING
    assert launch() is launch()


def test_no_graph_without_a_gpu_or_where_it_is_not_wanted(device):
    for launch in (launcher(dict, device, cudagraph=False), GraphedUpdate(dict, torch.device("cpu"), True, False)):
        assert [launch() for _ in range(9)] == [{}] * 9
    assert GraphOnTheCPU.count == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the stand-in")
def test_the_stand_in_tells_what_a_graph_cannot_do(device):
    x, calls = torch.ones(3), []

    def waits():
        return {"x": x * x.sum().item()}

    def has_a_size_that_is_not_known():
        return {"x": x[x > 0]}

    def counts_in_python():
        calls.append(0)
        return {"x": x * len(calls)}

    for function in (waits, has_a_size_that_is_not_known):
        launch = launcher(function, device)
        with pytest.raises(AssertionError):
            for _ in range(9):
                launch()
    launch = launcher(counts_in_python, device)
    assert [launch()["x"][0].item() for _ in range(6)] == [1, 2, 3, 4, 4, 4], "frozen at the recording"


# ---- The scripts' updates ----
def make_matd3(device, **flags):
    torch.manual_seed(0)
    args = matd3.Args(hidden_size=16, num_critics=3, policy_freq=2, n_step=3, actor_threshold_bias=1.0, **flags)
    high = np.linspace(0.5, 1.5, AGENTS * ACT, dtype=np.float32).reshape(AGENTS, ACT)
    learner = matd3.Learner(STATE, -high, 2 * high, args, device)
    return learner, matd3.Replay(30, ENVS, STATE, (AGENTS, ACT), args.n_step, args.gamma, device)


def train_matd3(learner, replay, device, wrap):
    """Rounds of acting and updates as in the script's main(), with resets: (losses of each round, acting's actions)."""

    def update(with_policy):
        return learner.update(replay.sample(16), with_policy)

    updates = [wrap(functools.partial(update, with_policy)) for with_policy in (False, True)]
    torch.manual_seed(1)
    trace, logs, num_updates = [], {}, 0
    for number in range(10):
        with torch.no_grad():  # else they keep gradients' nodes of this stream alive, which a graph must not meet
            layers = learner.actor.effective_layers()
        replay.add([draw_step() for _ in range(5)])
        for _ in range(4):
            num_updates += 1
            logs |= updates[num_updates % 2 == 0]()
        if number == 6:
            if learner.actor.masked:
                matd3.reset_actor(learner.actor, 0.5)
            matd3.reset_critic(learner.critic, 1)
        obs = torch.randn(ENVS, AGENTS, STATE + AGENTS, device=device)
        acted = {"actions": learner.actor.act(obs, layers).detach()}
        trace.append({name: value.clone() for name, value in (logs | acted).items()})
    return trace


@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
def test_matd3_learns_the_same_with_graphs(sharing, device):
    trained, replays = zip(*[make_matd3(device, sharing=sharing) for _ in range(2)], strict=True)
    compare(
        trained,
        train_matd3(trained[0], replays[0], device, lambda function: function),
        train_matd3(trained[1], replays[1], device, lambda function: launcher(function, device)),
    )
    assert GraphOnTheCPU.count == 40 - 2 * CALLS_BEFORE_RECORDING


def make_mappo(device, **flags):
    torch.manual_seed(0)
    settings = dict(hidden_size=16, rollout_steps=6, num_epochs=2, num_minibatches=1)
    args = mappo.Args(clip=0.2, entropy_coef=0.01, lr=1e-3, **settings | flags)
    high = np.linspace(0.5, 1.5, AGENTS * ACT, dtype=np.float32).reshape(AGENTS, ACT)
    learner = mappo.Learner(STATE, -high, 2 * high, args, device)
    return learner, mappo.Rollout(6, ENVS, STATE, (AGENTS, ACT), device)


def train_mappo(learner, rollout, device, wrap):
    """Rollouts and updates as in the script's main(), with resets: (losses of each round, acting's actions)."""
    update = wrap(functools.partial(learner.update, rollout))
    torch.manual_seed(1)
    trace = []
    for number in range(8):
        with torch.no_grad():  # else they keep gradients' nodes of this stream alive, which a graph must not meet
            layers = learner.actor.effective_layers()
        rollout.store([draw_step() for _ in range(6)])
        learner.scale_learning_rates(1 - number / 8)
        logs = update()
        if number == 5 and learner.actor.masked:
            mappo.reset_actor(learner.actor, 0.5)
        obs = torch.randn(ENVS, AGENTS, STATE + AGENTS, device=device)
        acted = {"actions": learner.actor.act(obs, layers).detach()}
        trace.append({name: value.clone() for name, value in (logs | acted).items()})
    return trace


@pytest.mark.parametrize("num_minibatches", [1, 3])
@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
def test_mappo_learns_the_same_with_graphs(sharing, num_minibatches, device):
    flags = dict(sharing=sharing, num_minibatches=num_minibatches)
    trained, rollouts = zip(*[make_mappo(device, **flags) for _ in range(2)], strict=True)
    compare(
        trained,
        train_mappo(trained[0], rollouts[0], device, lambda function: function),
        train_mappo(trained[1], rollouts[1], device, lambda function: launcher(function, device)),
    )
    assert GraphOnTheCPU.count == 8 - CALLS_BEFORE_RECORDING


def compare(learners, expected, got):
    """Losses of all rounds and all that the learners hold."""
    expected, got = [*expected, learners[0].state_dict()], [*got, learners[1].state_dict()]
    if next(learners[0].parameters()).device.type == "cpu":
        assert all(map(same, got, expected))
    for a, b in zip(got, expected, strict=True):  # a GPU may choose other kernels for a graph
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.equal(expected[0]["actions"], expected[-2]["actions"])


# ---- A GPU beside the CPU ----
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
@pytest.mark.parametrize("name", ["matd3", "mappo"])
def test_a_gpu_learns_what_the_cpu_learns(name, sharing, device):
    """The same weights and rows, and no draws: losses of three updates, and Adam's moments after the first."""
    torch.set_float32_matmul_precision("highest")
    make, flags = {"matd3": (make_matd3, dict(policy_noise=0.0)), "mappo": (make_mappo, {})}[name]
    logs, moments, weights, steps = [], [], None, None
    for each in (torch.device("cpu"), device):
        learner, store = make(each, sharing=sharing, **flags)
        if weights is None:
            weights, steps = copy.deepcopy(learner.state_dict()), [draw_step() for _ in range(6)]
        learner.load_state_dict(weights)
        if name == "mappo":
            store.store(steps)
            update = functools.partial(learner.update, store)
        else:
            store.add(steps)
            torch.manual_seed(3)
            row, env = torch.randint(6, (16,)).to(each), torch.randint(ENVS, (16,)).to(each)
            reward, discount, last = store.n_step_return(row, env)
            state, next_state = store.state[row, env], store.next_state[last, env]
            batch = SimpleNamespace(
                state=state,
                obs=matd3.agent_observations(state, AGENTS),
                actions=store.actions[row, env],
                reward=reward,
                discount=discount,
                next_state=next_state,
                next_obs=matd3.agent_observations(next_state, AGENTS),
                terminated=store.terminated[last, env],
            )
            update = functools.partial(learner.update, batch, with_policy=True)
        logs.append([{tag: value.cpu() for tag, value in update().items()}])
        states = [optimizer.state_dict()["state"] for optimizer in learner.optimizers]
        moments.append([state[i]["exp_avg"].cpu().clone() for state in states for i in state])
        logs[-1] += [{tag: value.cpu() for tag, value in update().items()} for _ in range(2)]
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-3, atol=1e-5)
    for a, b in zip(*moments, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()
    assert logs[0][0] != logs[0][2]


# ---- torch.compile ----
@pytest.mark.long
@pytest.mark.parametrize("name", ["matd3", "mappo"])
def test_compiled_updates_learn_the_same(name, device, monkeypatch):
    """Without a compiler, by what would be given to it: to compile such an update takes a minute and more."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    make, train = {"matd3": (make_matd3, train_matd3), "mappo": (make_mappo, train_mappo)}[name]
    trained, stores = zip(*[make(device) for _ in range(2)], strict=True)
    expected = train(trained[0], stores[0], device, lambda function: function)
    got = train(trained[1], stores[1], device, lambda function: GraphedUpdate(function, device, False, True))
    for a, b in zip([*got, trained[1].state_dict()], [*expected, trained[0].state_dict()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make, script", [(make_matd3, matd3), (make_mappo, mappo)], ids=["matd3", "mappo"])
def test_an_optimiser_keeps_the_options_of_its_own_device(make, script, tmp_path):
    """The CPU's have capturable=False, which a GPU's graphs cannot do with, and learning rates follow from the step."""
    learner, _ = make(torch.device("cpu"))
    for parameter in learner.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in learner.optimizers:
        optimizer.step()
    envs = SimpleNamespace(get_state=dict, set_state=lambda state: None)
    checkpoints.write_checkpoint(str(tmp_path), NoWriter(), learner, envs, np.zeros(1), (0, 0))
    checkpoint = checkpoints.read_checkpoint(str(tmp_path), script.Args)
    other, _ = make(torch.device("cpu"))
    for optimizer in other.optimizers:  # as it would be made on another device
        for group in optimizer.param_groups:
            group |= dict(capturable=True, fused=None, foreach=True, lr=torch.tensor(0.25))
    checkpoints.restore_checkpoint(checkpoint, other, envs)
    for old, new in zip(learner.optimizers, other.optimizers, strict=True):
        for group in new.param_groups:
            assert (group["capturable"], group["fused"], group["foreach"], group["lr"]) == (True, None, True, 0.25)
        for a, b in zip(old.state_dict()["state"].values(), new.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in ("step", "exp_avg", "exp_avg_sq")) and a["step"] == 1
