"""What every process of tests/test_processes.py runs, under torchrun: python worker_of_processes.py FOLDER."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3

AGENTS, ACT, STATE = 3, 2, 7
HIGH = np.linspace(0.5, 1.5, AGENTS * ACT, dtype=np.float32).reshape(AGENTS, ACT)
MATD3 = "--env-id HalfCheetah-v2-2x3 --device cpu --total-timesteps 640 --warmup-steps 200 --batch-size 32 --num-envs 2"
MATD3 += " --train-interval 10 --updates-per-round 4 --hidden-size 32 --eval-interval 300 --eval-episodes 2"
MATD3 += " --episode-limit 30 --log-interval 100 --actor-reset-interval 150 --critic-reset-interval 100"
MATD3 += " --actor-threshold-bias 0 --save-model --num-threads 1"
MAPPO = "--env-id HalfCheetah-v2-2x3 --device cpu --total-timesteps 640 --num-envs 2 --rollout-steps 10 --num-epochs 2"
MAPPO += " --num-minibatches 2 --hidden-size 32 --eval-interval 300 --eval-episodes 2 --episode-limit 17"
MAPPO += " --log-interval 100 --actor-reset-interval 150 --actor-threshold-bias 0"
MAPPO += " --save-model --num-threads 1"


def make(script, **settings):
    """A small Learner, the same in all processes, in float64."""
    torch.manual_seed(0)
    settings = dict(hidden_size=16, deque_len=3, actor_threshold_bias=1.0) | settings
    learner = script.Learner(STATE, -HIGH, HIGH, script.Args(**settings), torch.device("cpu"))
    return learner.double()


def matd3_learner():
    return make(matd3, num_critics=3, policy_freq=2, n_step=3, policy_noise=0.0)


def mappo_learner():
    settings = dict(rollout_steps=6, num_epochs=2, num_minibatches=1, clip=0.2, entropy_coef=0.01, lr=1e-3)
    return make(mappo, **settings, lr_schedule="constant", num_envs=4, output_gain=1.0)


def matd3_batch(seed, rows=slice(None)):
    """The rows of a batch of 12."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    whole = SimpleNamespace(
        state=normal(12, STATE),
        obs=normal(12, AGENTS, STATE + AGENTS),
        actions=normal(12, AGENTS, ACT).clamp(-0.5, 0.5),
        reward=normal(12),
        discount=0.9 ** torch.randint(1, 4, (12,), generator=draw).double(),
        next_state=normal(12, STATE),
        next_obs=normal(12, AGENTS, STATE + AGENTS),
        terminated=torch.rand(12, generator=draw) < 0.3,
    )
    return SimpleNamespace(**{name: part[rows] for name, part in vars(whole).items()})


def mappo_rollout(seed, envs=slice(None)):
    """The environments' part of a Rollout of 6 steps of 4."""
    torch.manual_seed(seed)
    whole = mappo.Rollout(6, 4, STATE, (AGENTS, ACT), torch.device("cpu"))
    for name in ("state", "next_state", "actions", "reward"):
        setattr(whole, name, torch.randn_like(getattr(whole, name)).double())
    whole.terminated = torch.rand(6, 4) < 0.2
    whole.truncated = (torch.rand(6, 4) < 0.2) & ~whole.terminated
    for name in ("state", "next_state", "actions", "reward", "terminated", "truncated"):
        setattr(whole, name, getattr(whole, name)[:, envs])
    return whole


def updates(learner, part):
    """Four updates of a learner from matd3_learner or mappo_learner on its part (a slice per size) of the data."""
    for seed in range(4):
        if isinstance(learner, matd3.Learner):
            learner.update(matd3_batch(seed, part(12)), with_policy=seed % 2 == 1)
        else:
            learner.update(mappo_rollout(seed, part(4)))
    return learner.state_dict()


def main(folder):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    os.chdir(folder)
    # one group for all that runs here: groups made one after the other would meet each other's traces in the store
    dist.init_process_group("gloo")
    dist.init_process_group = lambda backend: None
    matd3.processes.end_processes = lambda: None
    found = {}
    for name, script, flags in (("matd3", matd3, MATD3), ("mappo", mappo, MAPPO)):
        kept = []

        class Learner(script.Learner):
            def __init__(self, *args):
                super().__init__(*args)
                kept.append(self)  # noqa: B023, read before the next round

        script.Learner = Learner
        sys.argv = [script.__file__, *flags.split()]
        script.main()
        found[name] = kept[0].state_dict()
    for name, learner in (("matd3", matd3_learner()), ("mappo", mappo_learner())):
        found[f"{name} halves"] = updates(learner, lambda size: slice(rank * size // 2, (rank + 1) * size // 2))
    dist.destroy_process_group()
    torch.save(found, Path(folder, f"rank{rank}.pt"))


if __name__ == "__main__":
    main(sys.argv[1])
