from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kalei_matd3_mamujoco as script

torch.set_num_threads(1)  # the tests' networks are too small for more, and pytest runs two tests at a time


@pytest.fixture
def make_learner():
    """A function that makes a small Learner of 3 agents with 2 actions each and a state of 7 numbers."""

    def make(dtype=torch.float32, num_agents=3, seed=0, **changes):
        torch.manual_seed(seed)
        settings = dict(hidden_size=16, num_critics=4, policy_freq=2, n_step=3, deque_len=2) | changes
        settings.setdefault("actor_threshold_bias", 1.0)  # masks that differ from the start
        args = script.Args(**settings)
        high = np.linspace(0.5, 1.5, num_agents * 2, dtype=np.float32).reshape(num_agents, 2)
        learner = script.Learner(7, -high, 2 * high, args, torch.device("cpu"))
        for network in (learner.actor, learner.critic, learner.target_actor, learner.target_critic):
            network.to(dtype)
        for coefficient in (learner.actor_coefficient, learner.critic_coefficient):
            coefficient.losses = coefficient.losses.to(dtype)
        return learner

    return make


@pytest.fixture
def make_batch():
    """A function that draws a batch that fits make_learner's learners."""

    def make(size=12, num_agents=3, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=dtype)

        return SimpleNamespace(
            state=normal(size, 7),
            obs=normal(size, num_agents, 7 + num_agents),
            actions=normal(size, num_agents, 2).clamp(-0.5, 0.5),
            reward=normal(size),
            discount=0.9 ** torch.randint(1, 4, (size,), generator=generator).to(dtype),
            next_state=normal(size, 7),
            next_obs=normal(size, num_agents, 7 + num_agents),
            terminated=torch.rand(size, generator=generator) < 0.3,
        )

    return make
