"""Multi-agent MuJoCo: robots whose joints are divided among agents, as one vector environment.

    envs = MaMuJoCoVecEnv("Ant-v2-4x2", num_envs=10, seed=1)  # 4 agents of 2 joints each
    obs, infos = envs.reset()                                 # obs (E, N, obs) float32
    actions = envs.action_space.sample()                      # (E, N, act) float32
    obs, reward, terminated, truncated, infos = envs.step(actions)
    envs.close()

E environments, N agents, S numbers of state, O numbers of an agent's observation. All environments are stepped in one
call of mujoco.batch.Batch, on a pool of threads. The robots are in mamujoco_tasks.py. An agent observes the full state
and its own id (O = S + N), or, with agent_obsk, its own part of the state.

What step returns, besides reward, terminated and truncated (E,):
  obs                    (E, N, O) float32: every agent's observation after automatic resets
  infos["state"]         (E, S) float64: the state that `obs` shows
  infos["final_obs"]     (E, N, O), infos["final_state"] (E, S): the same before automatic resets, which is
                         what an action led to: the `next_state` of a replay buffer, for every environment
  infos["_final_obs"]    (E,) bool: the environments that were reset in this step
  infos["episode"]       {"r": returns (E,), "l": lengths (E,)}, valid where infos["_episode"] (E,) is true;
                         the keys are there only when an episode has ended
  infos["unstable"]      how many episodes have ended in an unstable simulation so far
The environment does not write to returned arrays again, but some of them are one array (where nothing was reset,
obs is final_obs): copy before changing one in place. A program that forks (torch's DataLoader, Gymnasium's
AsyncVectorEnv) must do it by "spawn" or "forkserver", since the threads of the pool do not survive a fork.

An episode ends as terminated where the task says so, and where MuJoCo reports an unstable simulation (reward 0,
final state: the last good one). It is truncated after `episode_limit` steps. Environment i draws its resets
from default_rng([seed, i]): its trajectory depends on the seed, i and its actions, on nothing else.
"""

import os
import warnings

import mujoco
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from mujoco.batch import Batch, SimulationError

from mamujoco_tasks import joint_graph, parse_env_id


# ---- Observations: pure functions of the state, for NumPy arrays and torch tensors with any leading dimensions ----
def standardise(x):
    """(x - mean) / std over the last axis: the critic's view of the state. (..., S) -> (..., S)."""
    size = x.shape[-1]  # sum / size, since NumPy's mean takes three times as long on a few numbers
    centred = x - x.sum(axis=-1, keepdims=True) / size
    variance = (centred * centred).sum(axis=-1, keepdims=True) / size
    return centred / (variance + 1e-30) ** 0.5  # 1e-30: finite for a constant vector too


def agent_observations(state, num_agents, dtype=None, columns=None):
    """Each agent's observation: what it sees of the state and its one-hot id, standardised together.

    (..., S) -> (..., N, O), where the state is, in its dtype or the one given. Without `columns`, agents see the whole
    state: O = S + N. With `columns` (N, W), as MaMuJoCoVecEnv has them, they see those: O = W + N, and 0 where a column
    is -1, which fills up the shorter rows.
    """
    new_zeros = np.zeros if isinstance(state, np.ndarray) else state.new_zeros
    width = state.shape[-1] if columns is None else columns.shape[-1]
    total = width + num_agents
    obs = new_zeros((*state.shape[:-1], num_agents, total), dtype=dtype or state.dtype)
    if columns is None:
        # all ids hold a single 1, so that mean and std are the same for all agents and are computed once
        first = new_zeros((*state.shape[:-1], total), dtype=state.dtype)  # agent 0's vector: the others' hold the same
        first[..., :width], first[..., width] = state, 1.0  # numbers in another order
        first = standardise(first)
        obs[..., :width] = first[..., None, :width]
        obs[..., width:] = first[..., None, -1:]
        # flattened over agents, the ones of the ids stand total + 1 apart
        obs.reshape(*state.shape[:-1], num_agents * total)[..., width :: total + 1] = first[..., width : width + 1]
        return obs
    seen = new_zeros((num_agents, total), dtype=state.dtype) + 1.0
    seen[:, :width] = columns >= 0
    own = new_zeros(obs.shape, dtype=state.dtype)
    own[..., :width] = state[..., columns]
    own.reshape(*state.shape[:-1], num_agents * total)[..., width :: total + 1] = 1.0
    own *= seen
    count = seen.sum(axis=-1, keepdims=True)
    centred = (own - own.sum(axis=-1, keepdims=True) / count) * seen
    obs[...] = centred / ((centred * centred).sum(axis=-1, keepdims=True) / count + 1e-30) ** 0.5
    return obs


# ---- The vector environment ----
HUGE = 1e10  # mjMAXVAL, from which on MuJoCo takes a simulation for unstable


class MaMuJoCoVecEnv(VectorEnv):
    """`num_envs` copies of one multi-agent task; the module's docstring says what they return.

    Args:
      env_id: a robot and its partition, as "Ant-v2-4x2", "Humanoid-v2-9|8", "manyagent_swimmer-10x2"
      num_envs: E
      seed: of the reset noise; a later reset(seed=...) replaces it
      num_threads: threads to step on, 0 for one per CPU
      episode_limit: steps after which an episode is truncated
      agent_obsk: None: agents see the full state; K: their own joints, the positions of joints at up to K steps in the
        joint graph, and the root, as MaMuJoCo's agent_obsk (Task.observed says exactly what)
    Raises ValueError for an unknown id or an impossible number, naming it.

    Attributes:
      num_agents: N; state_size: S; state: (E, S) float64, the current one
      columns: None, or with agent_obsk (N, W) int: the columns of the state that each agent sees, rows filled up by -1
      single_action_space: Box (N, act): the controls' bounds; agents with fewer joints than the others are padded
        with actions that go nowhere, whose bounds are 0
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, env_id, num_envs, seed=0, num_threads=0, episode_limit=1000, agent_obsk=None):
        super().__init__()
        task, segments, agents = parse_env_id(env_id)
        limits = (("num_envs", num_envs, 1), ("num_threads", num_threads, 0), ("episode_limit", episode_limit, 1))
        limits += () if agent_obsk is None else (("agent_obsk", agent_obsk, 0),)
        for name, value, least in limits:
            if not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
        self.env_id, self.num_envs, self.num_agents, self.episode_limit = env_id, num_envs, len(agents), episode_limit
        self.task = task(segments)
        model = self.task.model
        self.batch = Batch(model, num_envs, min(num_threads or os.cpu_count(), num_envs), self.task.measured)
        self.task.bind(self.batch)
        self._ctrl = self.batch.bind("ctrl")
        self._blank = self.batch.state[0].copy()  # a row of the batch as MuJoCo starts it
        bad = slice(mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQACC + 1)  # QVEL is between them
        self._unstable_warnings = self.batch.warning[:, bad, 1]  # how often

        # actuator j takes number _gather[j] of the agents' actions laid end to end
        width = max(len(joints) for joints in agents)
        actuator_of = {int(joint): j for j, joint in enumerate(model.actuator_trnid[:, 0])}
        self._gather = np.full(model.nu, -1)
        bounds = np.zeros((2, self.num_agents, width), np.float32)
        for agent, joints in enumerate(agents):
            for k, joint in enumerate(joints):
                actuator = actuator_of[model.joint(joint).id]
                self._gather[actuator] = agent * width + k
                bounds[:, agent, k] = model.actuator_ctrlrange[actuator]
        assert (self._gather >= 0).all(), f"{env_id}: some actuators have no agent"

        self.columns = None
        if agent_obsk is not None:
            cliques = joint_graph(self.task)
            seen = [self.task.observed(joints, agent_obsk, cliques) for joints in agents]
            width = max(len(own) for own in seen)
            self.columns = np.array([own + [-1] * (width - len(own)) for own in seen])
        self._seed(seed)
        self._returns, self._lengths, self._num_unstable = np.zeros(num_envs), np.zeros(num_envs, int), 0
        self.state = self._start(np.arange(num_envs))
        self._seed(seed)  # so that the first reset() starts where reset(seed=seed) does
        self.state_size = self.state.shape[1]
        self.single_action_space = Box(*bounds)
        self.action_space = Box(*np.repeat(bounds[:, None], num_envs, axis=1))
        obs_shape = (num_envs, *self._observe(self.state).shape[1:])
        self.single_observation_space = Box(-np.inf, np.inf, obs_shape[1:])
        self.observation_space = Box(-np.inf, np.inf, obs_shape)

    def _seed(self, seed):
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"seed is {seed!r}, expected an integer of at least 0")
        self._rngs = [np.random.default_rng([seed, i]) for i in range(self.num_envs)]

    def _observe(self, state):
        return agent_observations(state, self.num_agents, np.float32, self.columns)

    def _start(self, ids):
        """Begin an episode in environments `ids`; return their states (len(ids), S)."""
        self.batch.state[ids] = self._blank  # as mj_resetData
        for i in ids:
            self.task.qpos[i], self.task.qvel[i] = self.task.sample(self._rngs[i])
        self.batch.forward(ids)
        if self.task.measured:
            self.task.forces[ids] = 0.0  # until the first step, as in Gymnasium
        self._returns[ids] = self._lengths[ids] = 0
        self._position = self.task.position()
        return self.task.state()[ids]

    def reset(self, *, seed=None, options=None):
        """Start all environments afresh, from the seed if there is one: obs (E, N, obs) and infos["state"]."""
        if seed is not None:
            self._seed(seed)
        self.state = self._start(np.arange(self.num_envs))
        return self._observe(self.state), {"state": self.state}

    def _check(self, actions):
        """Refuse actions of a wrong shape or not finite, before anything is stepped."""
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions have shape {actions.shape}, expected {self.action_space.shape}: (E, N, act)")
        if np.count_nonzero(np.isfinite(actions)) < actions.size:
            env, agent, k = np.argwhere(~np.isfinite(actions))[0]
            value = actions[env, agent, k]
            raise ValueError(f"action {k} of agent {agent} in environment {env} is {value}, expected a finite number")

    def step(self, actions):
        """Step all environments with actions (E, N, act); the module's docstring says what comes back.

        Raises ValueError for a wrong shape and for actions that are not finite, and then steps nothing.
        """
        actions = np.asarray(actions)
        self._check(actions)
        task, before, ctrl = self.task, self._position, self._ctrl
        ctrl[...] = actions.reshape(self.num_envs, -1).take(self._gather, axis=1)
        failed = False
        try:
            self.batch.step(nstep=task.frame_skip)
        except SimulationError:
            failed = True  # batch.status says which environments
        if task.measured:
            task.measure_forces(self.batch)
        state, after = task.state(), task.position()
        reward = task.reward(before, after, ctrl)
        terminated = task.unhealthy()
        # MuJoCo looks for huge values before each simulation step, so after the last one we do, in one sum
        sound = np.vdot(state, state) + np.vdot(reward, reward) < HUGE**2
        if failed or not sound or np.count_nonzero(self._unstable_warnings):
            self._end_unstable(state, reward, terminated)
        self._position = after
        self._returns += reward
        self._lengths += 1
        truncated = self._lengths >= self.episode_limit
        done = terminated | truncated
        infos = {"final_state": state, "_final_obs": done, "unstable": self._num_unstable}
        if np.count_nonzero(done):
            infos |= {"episode": {"r": self._returns.copy(), "l": self._lengths.copy()}, "_episode": done}
            ids = done.nonzero()[0]
            started = self._start(ids)
            # one call for final and first observations: on few numbers, calls cost more than what they compute
            observations = self._observe(np.concatenate([state, started]))
            infos["final_obs"] = observations[: self.num_envs]
            obs, state = infos["final_obs"].copy(), state.copy()
            obs[ids], state[ids] = observations[self.num_envs :], started
        else:
            infos["final_obs"] = obs = self._observe(state)
        infos["state"] = self.state = state
        return obs, reward, terminated, truncated, infos

    def _end_unstable(self, state, reward, terminated):
        """End unstable episodes: reward 0, terminated, and in the place of the state the last good one."""
        bad = self._unstable_warnings.any(axis=1) | (self.batch.status != 0)
        bad |= ~((np.abs(state) < HUGE).all(axis=1) & (np.abs(reward) < HUGE))  # NaN is not less
        state[bad], reward[bad], terminated[bad] = self.state[bad], 0.0, True
        self.batch.warning[bad] = 0
        if not self._num_unstable and bad.any():
            which = np.flatnonzero(bad).tolist()
            warnings.warn(f"{self.env_id}: unstable simulation in environments {which}; episodes ended", stacklevel=3)
        self._num_unstable += int(bad.sum())

    def get_state(self):
        """All that the next steps depend on, randomness included, as arrays and plain values of its own."""
        arrays = {"physics": self.batch.state, "state": self.state, "position": self._position}
        arrays |= {"returns": self._returns, "lengths": self._lengths}
        saved = {name: array.copy() for name, array in arrays.items()}
        saved["rngs"] = [rng.bit_generator.state for rng in self._rngs]
        return saved | {"env_id": self.env_id, "unstable": self._num_unstable}

    def set_state(self, saved):
        """Continue from what get_state returned. ValueError if that was of another env id or num_envs."""
        theirs, ours = (saved["env_id"], len(saved["physics"])), (self.env_id, self.num_envs)
        if theirs != ours:
            raise ValueError(f"the state is of {theirs[1]} x {theirs[0]}, expected {ours[1]} x {ours[0]}")
        self.batch.state[:] = saved["physics"]
        self.state, self._position = saved["state"].copy(), saved["position"].copy()
        self._returns[:], self._lengths[:] = saved["returns"], saved["lengths"]
        self._num_unstable = saved["unstable"]
        for rng, state in zip(self._rngs, saved["rngs"], strict=True):
            rng.bit_generator.state = state
