"""The n-step replay buffer against a plain loop over stored transitions."""

import numpy as np
import pytest
import torch

import kalei_matd3_mamujoco as script
from mamujoco_env import agent_observations, critic_state

GAMMA, N_STEP, ENVS, ROWS, SIZE = 0.9, 4, 3, 11, 5


def fill(steps, columns=None, seed=0):
    """A buffer after `steps` steps of random data, and the data that is still in it, oldest first."""
    rng = np.random.default_rng(seed)
    replay = script.Replay(ROWS, ENVS, SIZE, (2, 3), N_STEP, GAMMA, torch.device("cpu"), columns)
    stored = []
    for _ in range(steps):
        terminated = rng.random(ENVS) < 0.15
        truncated = rng.random(ENVS) < 0.15
        step = [rng.normal(size=(ENVS, SIZE)), rng.normal(size=(ENVS, 2, 3)), rng.normal(size=ENVS)]
        step += [rng.normal(size=(ENVS, SIZE)), terminated, truncated]
        replay.add([step])
        stored.append(step)
    return replay, stored[-ROWS:]


def plain_n_step(stored, t, env):
    total, m = 0.0, 0
    while True:
        _, _, reward, next_state, terminated, truncated = (part[env] for part in stored[t + m])
        total += GAMMA**m * reward
        m += 1
        if terminated or truncated or m == N_STEP or t + m == len(stored):
            return total, GAMMA**m, next_state, terminated


def test_n_step_returns_of_every_slot_before_and_after_wrapping():
    for steps in (1, 2, 7, 11, 12, 30, 37):
        replay, stored = fill(steps, seed=steps)
        first = (replay.next_row - len(stored)) % ROWS
        for t in range(len(stored)):
            for env in range(ENVS):
                row, column = torch.tensor([(first + t) % ROWS]), torch.tensor([env])
                reward, discount, last = replay.n_step_return(row, column)
                expected = plain_n_step(stored, t, env)
                np.testing.assert_allclose(reward.item(), expected[0], rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(discount.item(), expected[1], rtol=1e-6)
                np.testing.assert_array_equal(replay.next_state[last, column][0], np.float32(expected[2]))
                assert replay.terminated[last, column].item() == expected[3]


def test_samples_are_uniform_over_what_is_stored_and_nothing_else():
    replay, stored = fill(7)
    replay.state.fill_(torch.nan)
    for t in range(7):
        replay.state[t] = torch.as_tensor(stored[t][0])
    torch.manual_seed(0)
    batch = replay.sample(21_000)
    assert torch.isfinite(batch.state).all(), "an empty slot was drawn"
    drawn = torch.unique(batch.actions[:, 0, 0], return_counts=True)[1]
    assert len(drawn) == 21, "every stored transition is drawn"
    assert (drawn - 1000).abs().max() < 5 * 1000**0.5


def test_rows_that_are_not_filled_yet_reach_no_return(monkeypatch):
    """The window of n steps looks ahead of the newest row, where memory may hold anything before it is written."""
    empty = torch.empty

    def dirty(*args, **kwargs):
        memory = empty(*args, **kwargs)
        memory.view(-1).view(torch.uint8).fill_(255)  # NaN as float, neither 0 nor 1 as bool
        return memory

    monkeypatch.setattr(torch, "empty", dirty)
    replay, stored = fill(3)
    monkeypatch.undo()
    reward, _, last = replay.n_step_return(torch.tensor([1, 2]), torch.tensor([0, 0]))
    np.testing.assert_allclose(reward, [plain_n_step(stored, t, 0)[0] for t in (1, 2)], rtol=1e-5)
    assert last.max() <= 2


@pytest.mark.parametrize("columns", [None, np.array([[0, 2, -1], [1, 2, 0]])], ids=["full", "partial"])
def test_samples_hold_what_the_networks_see(columns):
    replay, stored = fill(9, columns)
    torch.manual_seed(0)
    batch = replay.sample(50)
    states = np.concatenate([step[0] for step in stored]).astype(np.float32)
    actions = np.concatenate([step[1] for step in stored]).astype(np.float32)
    for i in range(50):
        slot = int(np.flatnonzero((actions == batch.actions[i].numpy()).all((1, 2)))[0])
        np.testing.assert_allclose(batch.state[i], critic_state(states[slot]), atol=1e-5)
        seen = agent_observations(states[slot], 2, columns=columns)
        np.testing.assert_allclose(batch.obs[i], seen, atol=1e-5)
        t, env = divmod(slot, ENVS)
        reward, discount, next_state, terminated = plain_n_step(stored, t, env)
        np.testing.assert_allclose(batch.reward[i], reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch.discount[i], discount, rtol=1e-6)
        np.testing.assert_allclose(batch.next_state[i], critic_state(np.float32(next_state)), atol=1e-5)
        seen = agent_observations(np.float32(next_state), 2, columns=columns)
        np.testing.assert_allclose(batch.next_obs[i], seen, atol=1e-5)
        assert bool(batch.terminated[i]) == terminated


def test_sampling_reads_no_size_from_the_device():
    """What a captured graph needs: `filled` and `newest` are tensors, changed in place."""
    replay, _ = fill(3)
    filled, newest = replay.filled, replay.newest
    replay.add([fill(1)[1][0]])
    assert replay.filled is filled and replay.newest is newest
    assert (int(filled), int(newest)) == (4, 3)
