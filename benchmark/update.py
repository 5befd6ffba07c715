"""Times one whole update of Kaleidoscope-MATD3: ours, and one in plain Python loops.

    python benchmark/update.py --threads 2

An update draws a batch from the replay buffer and updates the critic; every policy_freq updates, it also updates all
agents one after the other, and the targets. Both learners start from the same weights. A round is policy_freq updates
of one learner, then of the other. Prints the median time of an update, and:
  * the floor: floating-point operations of the matrix products that the method needs, divided by the rate that this
    machine reaches on one large product
  * the rate for products of several masks at once
  * the number of operations on tensors in an update; a GPU launches each of them
"""

import dataclasses
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch is imported, as in the scripts

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.plain_loops import PlainLearner  # noqa: E402
from experiment.hardware import keep_freed_memory  # noqa: E402
from kalei_matd3_mamujoco import TUNED, UNTUNED, Args, Learner, Replay, resolve_precision  # noqa: E402
from mamujoco_env import MaMuJoCoVecEnv  # noqa: E402


@dataclasses.dataclass
class Options:
    env_id: str = "Ant-v2-4x2"
    """task that sets the sizes"""
    threads: int = 2
    """threads for the matrix products"""
    rounds: int = 40
    """timed rounds, of policy_freq updates each"""
    warmup_rounds: int = 5
    """untimed rounds before the timed ones"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of our hidden layers' products; the plain loops use float32"""


def product_flops(learner, batch_size):
    """Floating-point operations of the matrix products in one update, mean over policy_freq updates (multiply-add: 2).

    Counts a forward pass per network and mask, the backward passes towards weights and hidden layers and, in an agent's
    step, the backward pass through the critic towards the action. Leaves out products that the method does not need:
    gradients towards states and, in an agent's step, the parts of the critic's first layer that do not change.
    """
    args, agents, critics = learner.args, learner.num_agents, learner.args.num_critics

    def sizes(network):
        return [layer.weight.numel() * 2 * batch_size for layer in network.layers]

    actor, critic = sizes(learner.actor), sizes(learner.critic)
    action_columns = 2 * batch_size * args.hidden_size * learner.act_size
    target = agents * sum(actor) + critics * sum(critic)
    critic_step = critics * (2 * sum(critic) + sum(critic[1:]))
    agent_step = 2 * sum(actor) + sum(actor[1:]) + critics * 2 * (sum(critic[1:]) + action_columns)
    first_layer = critics * critic[0]
    return target + critic_step + (agents * agent_step + first_layer) / args.policy_freq


class CountOperations(TorchDispatchMode):
    """Counts operations that compute. Leaves out those that only return a view of their input, or fresh memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        is_view = any(result.alias_info and not result.alias_info.is_write for result in operation._schema.returns)
        is_memory = operation.overloadpacket.__name__ in ("empty", "empty_like", "empty_strided", "new_empty", "detach")
        self.count += not is_view and not is_memory and operation.overloadpacket.__name__ != "_unsafe_view"
        return operation(*args, **(kwargs or {}))


def product_rate(a, b):
    """Floating-point operations a second of the product a @ b, where a has all leading dimensions."""
    times = []
    for _ in range(50):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * a.numel() * b.shape[-1] / statistics.median(times)


def main():
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(1)
    n_step, policy_freq = TUNED.get(options.env_id, UNTUNED)
    precision = resolve_precision(options.precision, "cpu")
    args = Args(env_id=options.env_id, n_step=n_step, policy_freq=policy_freq, precision=precision)
    envs = MaMuJoCoVecEnv(args.env_id, args.num_envs)
    space, device = envs.single_action_space, torch.device("cpu")
    ours = Learner(envs.state_size, space.low, space.high, args, device)
    replay = Replay(1000, args.num_envs, envs.state_size, space.shape, n_step, args.gamma, device)
    state = envs.reset()[1]["state"]
    for _ in range(1000):  # 10,000 transitions from real physics
        actions = envs.action_space.sample()
        _, reward, terminated, truncated, infos = envs.step(actions)
        replay.add([(state, actions, reward, infos["final_state"], terminated, truncated)])
        state = infos["state"]
    plain = PlainLearner(ours, dtype=torch.float32)

    def our_update(with_policy):
        ours.update(replay.sample(args.batch_size), with_policy)

    def plain_update(with_policy):
        batch = replay.sample(args.batch_size)
        noise = torch.randn_like(batch.actions).mul_(args.policy_noise)
        plain.update(batch, noise.clamp_(-args.noise_clip, args.noise_clip), with_policy)

    times = {our_update: [], plain_update: []}
    for round_number in range(options.warmup_rounds + options.rounds):
        for update, taken in times.items():
            start = time.perf_counter()
            for i in range(1, policy_freq + 1):
                update(with_policy=i == policy_freq)
            if round_number >= options.warmup_rounds:
                taken.append((time.perf_counter() - start) / policy_freq * 1000)

    ratio = statistics.median(o / p for o, p in zip(*times.values(), strict=True))
    flops, rate = product_flops(ours, args.batch_size), product_rate(torch.randn(1000, 256), torch.randn(256, 1280))
    sizes = f"B {args.batch_size}, N {ours.num_agents}, K {args.num_critics}"
    print(f"{args.env_id}: {sizes}, policy_freq {policy_freq}, precision {precision}")
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{'':14}{'median':>10}{'min':>10}{'max':>10}   ms per update")
    for name, taken in zip(("ours", "plain loops"), times.values(), strict=True):
        print(f"{name:14}{statistics.median(taken):10.1f}{min(taken):10.1f}{max(taken):10.1f}")
    print(f"ours / plain loops, median over rounds: {ratio:.2f}")
    print(f"floor: {flops / 1e9:.2f} GFLOP of products at {rate / 1e9:.0f} GFLOP/s = {flops / rate * 1000:.1f} ms")
    rates = [product_rate(torch.randn(k, 1000, 256), torch.randn(k, 256, 256)) / 1e9 for k in (5, 6)]
    print(f"one product for 5 masks runs at {rates[0]:.0f} GFLOP/s, for 6 masks at {rates[1]:.0f}")
    counts = []
    for with_policy in (False, True):
        with CountOperations() as counted:
            our_update(with_policy)
        counts.append(counted.count)
    print(f"operations on tensors: {counts[0]} in an update of the critic alone, {counts[1]} with that of the policies")


if __name__ == "__main__":
    main()
