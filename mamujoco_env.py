"""Multi-agent MuJoCo: robots whose joints are divided among agents, as one vector environment.

    envs = MaMuJoCoVecEnv("Ant-v2-4x2", num_envs=10, seed=1)  # 4 agents of 2 joints each
    obs, infos = envs.reset()                                 # obs (E, N, obs) float32
    actions = envs.action_space.sample()                      # (E, N, act) float32
    obs, reward, terminated, truncated, infos = envs.step(actions)
    envs.close()

E environments, N agents, S numbers of state. All environments are stepped in one call of
mujoco.batch.Batch, on a pool of threads. The robots, their rewards, terminations and reset noise are those of
Gymnasium's MuJoCo v4 tasks, with the contact forces (and their costs) at zero, which is what the v2 tasks of
the multi-agent literature report (Peng et al. 2021, "FACMAC", who introduced these tasks).

What step returns, besides reward, terminated and truncated (E,):
  obs                    (E, N, S + N) float32: every agent's observation after automatic resets
  infos["state"]         (E, S) float64: the state that `obs` shows
  infos["final_obs"]     (E, N, S + N), infos["final_state"] (E, S): the same before automatic resets, which is
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

import math
import os
import re
import warnings

import gymnasium
import mujoco
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from mujoco.batch import Batch, SimulationError

ASSETS = os.path.join(os.path.dirname(gymnasium.__file__), "envs", "mujoco", "assets")


# ---- Observations: pure functions of the state, for NumPy arrays and torch tensors with any leading dimensions ----
def standardise(x):
    """(x - mean) / std over the last axis: the critic's view of the state. (..., S) -> (..., S)."""
    size = x.shape[-1]  # sum / size, since NumPy's mean takes three times as long on a few numbers
    centred = x - x.sum(axis=-1, keepdims=True) / size
    variance = (centred * centred).sum(axis=-1, keepdims=True) / size
    return centred / (variance + 1e-30) ** 0.5  # 1e-30: finite for a constant vector too


def agent_observations(state, num_agents, dtype=None):
    """Each agent's observation: the state and the agent's one-hot id, standardised together.

    (..., S) -> (..., N, S + N), where the state is, in its dtype or the one given. All ids hold a single 1, so
    that mean and std are the same for all agents and are computed once.
    """
    size, total = state.shape[-1], state.shape[-1] + num_agents
    new_zeros = np.zeros if isinstance(state, np.ndarray) else state.new_zeros
    first = new_zeros((*state.shape[:-1], total), dtype=state.dtype)  # agent 0's vector: the others' hold the same
    first[..., :size], first[..., size] = state, 1.0  # numbers in another order
    first = standardise(first)
    obs = new_zeros((*state.shape[:-1], num_agents, total), dtype=dtype or state.dtype)
    obs[..., :size] = first[..., None, :size]
    obs[..., size:] = first[..., None, -1:]
    # flattened over agents, the ones of the ids stand total + 1 apart
    obs.reshape(*state.shape[:-1], num_agents * total)[..., size :: total + 1] = first[..., size : size + 1]
    return obs


# ---- Models: those that Gymnasium does not ship are built in code ----
HINGE, SLIDE = mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE


def compile_quietly(spec):
    """Compile without the warning that settotalmass, which Gymnasium's half-cheetah uses, is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spec.compile()


def _empty_spec():
    """An empty world in degrees with RK4 and a time step of 5 ms, a light, and a floor that collides with all."""
    spec = mujoco.MjSpec()
    spec.compiler.degree = True
    spec.option.integrator, spec.option.timestep = mujoco.mjtIntegrator.mjINT_RK4, 0.005
    spec.worldbody.add_light(pos=[0, 0, 1.3], dir=[0, 0, -1.3], type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
    spec.worldbody.add_geom(name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[40, 40, 40])
    return spec


def _capsule(body, end, radius, start=(0, 0, 0), **options):
    body.add_geom(type=mujoco.mjtGeom.mjGEOM_CAPSULE, fromto=[*start, *end], size=[radius, 0, 0], **options)


def _motor(spec, joint):
    motor = spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    motor.gear[0], motor.ctrlrange, motor.ctrllimited = 150, [-1, 1], mujoco.mjtLimited.mjLIMITED_TRUE


def build_swimmer(segments):
    """A swimmer of a head and `segments` bodies in a chain, one motor between each two."""
    spec = _empty_spec()
    spec.option.density, spec.option.viscosity = 4000, 0.1
    spec.geom("floor").pos = [0, 0, -0.1]
    spec.geom("floor").contype = spec.geom("floor").conaffinity = 0
    body = spec.worldbody.add_body(name="torso")
    link = dict(radius=0.1, density=1000, contype=0, conaffinity=0)
    _capsule(body, start=(1.5, 0, 0), end=(0.5, 0, 0), **link)
    for name, kind, axis in (("slider1", SLIDE, (1, 0, 0)), ("slider2", SLIDE, (0, 1, 0)), ("rot", HINGE, (0, 0, 1))):
        body.add_joint(name=name, type=kind, axis=axis, armature=0.1)
    for i in range(segments):
        body = body.add_body(name=f"mid{i}", pos=[0.5 if i == 0 else -1.0, 0, 0])
        _capsule(body, end=(-1, 0, 0), **link)
        up = 1 if i in (0, segments - 1) else (-1) ** (i + 1)
        body.add_joint(name=f"rot{i}", type=HINGE, axis=[0, 0, up], range=[-100, 100], armature=0.1)
        _motor(spec, f"rot{i}")
    return spec.compile()


def build_ant(segments):
    """An ant with a spine of `segments` rigidly joined segments, each with two legs of hip and ankle."""
    spec = _empty_spec()
    skin = dict(conaffinity=0, friction=[1, 0.5, 0.5], margin=0.01)
    spec.geom("floor").friction, spec.geom("floor").margin = skin["friction"], skin["margin"]
    body = spec.worldbody.add_body(name="torso_0", pos=[0, 0, 0.75])
    body.add_freejoint(name="root")
    for i in range(segments):
        if i > 0:
            body = body.add_body(name=f"torso_{i}", pos=[-1, 0, 0])
            _capsule(body, start=(1, 0, 0), end=(0, 0, 0), radius=0.1, density=100, **skin)
        for leg, side in ((1, 1), (2, -1)):
            x, bend = (0.2, [30, 70]) if i == 0 else (-0.2, [-70, -30])
            hip_at = (x if i == 0 else 0, 0.2 * side, 0)
            thigh = body.add_body(name=f"leg{leg}_{i}")
            _capsule(thigh, end=hip_at, radius=0.08, density=5, **skin)
            shin = thigh.add_body(name=f"aux{leg}_{i}", pos=hip_at)
            joint = dict(type=HINGE, armature=1, damping=[1, 0, 0], margin=0)
            shin.add_joint(name=f"hip{leg}_{i}", axis=[0, 0, 1], range=[-30, 30], **joint)
            _capsule(shin, end=(x, 0.2 * side, 0), radius=0.08, density=5, **skin)
            foot = shin.add_body(name=f"foot{leg}_{i}", pos=[x, 0.2 * side, 0])
            axis = [-side if i == 0 else side, 1, 0]
            foot.add_joint(name=f"ankle{leg}_{i}", axis=axis, range=bend, **joint)
            _capsule(foot, end=(2 * x, 0.4 * side, 0), radius=0.08, density=5, **skin)
            _motor(spec, f"hip{leg}_{i}")
            _motor(spec, f"ankle{leg}_{i}")
    return spec.compile()


def build_coupled_half_cheetah(segments):
    """Two of Gymnasium's half-cheetahs side by side, their torsos tied by a spatial tendon."""
    path = os.path.join(ASSETS, "half_cheetah.xml")
    spec, second = mujoco.MjSpec.from_file(path), mujoco.MjSpec.from_file(path)
    spec.body("torso").pos = [0, -1, 0.7]
    spec.body("torso").add_site(name="tie")
    second.body("torso").add_site(name="tie")
    spec.worldbody.add_frame(pos=[0, 1, 0]).attach_body(second.body("torso"), "second_", "")
    tendon = spec.add_tendon(name="tendon", range=[1.5, 3.5], stiffness=[0.1, 0, 0])
    tendon.limited = mujoco.mjtLimited.mjLIMITED_TRUE
    tendon.wrap_site("tie")
    tendon.wrap_site("second_tie")
    return compile_quietly(spec)  # the file's total mass, 14, is now that of both together


# ---- Tasks: state, reward and termination of a whole batch at once ----
class Task:
    """A robot that is rewarded for moving forward: what the tasks below share. Shapes are those of a batch.

    Attributes:
      model_file: XML of Gymnasium that holds the robot
      frame_skip: simulation steps in an environment step
      hidden_positions: how many of the first positions the state leaves out
      velocity_limit: the state's velocities are clipped to +- this
      contact_forces: whether the state ends in contact forces, six a body, which are zero
      forward_weight, control_cost, alive: reward = forward_weight * velocity - control_cost * |ctrl|^2 + alive
      noise, velocity_noise: resets add U(-noise, noise) to the positions; to the velocities too where
        velocity_noise is "uniform", and N(0, noise) where it is "normal"
    """

    model_file: str
    frame_skip = 5
    hidden_positions = 1
    velocity_limit = math.inf
    contact_forces = False
    forward_weight, control_cost, alive = 1.0, 0.1, 0.0
    noise, velocity_noise = 0.1, "normal"

    def __init__(self, segments):
        self.model = self.build(segments)
        self.dt = self.model.opt.timestep * self.frame_skip  # seconds

    def build(self, segments):
        return compile_quietly(mujoco.MjSpec.from_file(os.path.join(ASSETS, self.model_file)))

    def bind(self, batch):
        """Take live views of the batch's arrays; they follow every call to the batch."""
        self.qpos, self.qvel = batch.bind("qpos"), batch.bind("qvel")
        self.state_parts = [self.qpos[:, self.hidden_positions :], self.qvel]
        if self.contact_forces:
            self.state_parts.append(np.zeros((batch.nsim, 6 * self.model.nbody)))

    def state(self):
        """(E, S) float64, a new array."""
        state = np.concatenate(self.state_parts, axis=1)
        if self.velocity_limit < math.inf:
            velocity, limit = state[:, -self.model.nv :], self.velocity_limit
            np.maximum(np.minimum(velocity, limit, out=velocity), -limit, out=velocity)
        return state

    def position(self):
        """(E,), a new array: the place in metres whose change over a step is the forward velocity."""
        return self.qpos[:, 0].copy()

    def reward(self, before, after, ctrl):
        """(E,) from the positions before and after the step and the controls (E, nu)."""
        reward = np.vecdot(ctrl, ctrl)
        reward *= -self.control_cost
        reward += (after - before) * (self.forward_weight / self.dt)
        return reward + self.alive if self.alive else reward

    def unhealthy(self):
        """(E,) bool, a new array: where the episode terminates."""
        return np.zeros(len(self.qpos), bool)

    def sample(self, rng):
        """Positions (nq,) and velocities (nv,) at the start of an episode."""
        qpos = self.model.qpos0 + rng.uniform(-self.noise, self.noise, self.model.nq)
        if self.velocity_noise == "normal":
            return qpos, self.noise * rng.standard_normal(self.model.nv)
        return qpos, rng.uniform(-self.noise, self.noise, self.model.nv)


class Ant(Task):
    model_file, hidden_positions, contact_forces = "ant.xml", 2, True
    control_cost, alive = 0.5, 1.0
    body = 1  # the torso, as in Gymnasium measured by xpos, which lags one simulation step behind qpos

    def bind(self, batch):
        super().bind(batch)
        self.x, self.height = batch.bind("xpos")[:, self.body, 0], self.qpos[:, 2]

    def position(self):
        return self.x.copy()

    def unhealthy(self):
        return (self.height < 0.2) | (self.height > 1.0)


class ManyAgentAnt(Ant):
    frame_skip, build = 4, staticmethod(build_ant)


class HalfCheetah(Task):
    model_file = "half_cheetah.xml"


class CoupledHalfCheetah(HalfCheetah):
    build = staticmethod(build_coupled_half_cheetah)
    control_cost = 0.05  # the mean over both cheetahs of 0.1 |ctrl|^2

    def position(self):
        return (self.qpos[:, 0] + self.qpos[:, self.model.nq // 2]) / 2


class Swimmer(Task):
    model_file, frame_skip, hidden_positions = "swimmer.xml", 4, 2
    control_cost, velocity_noise = 1e-4, "uniform"


class ManyAgentSwimmer(Swimmer):
    build = staticmethod(build_swimmer)


class Hopper(Task):
    model_file, frame_skip, velocity_limit = "hopper.xml", 4, 10.0
    control_cost, alive = 1e-3, 1.0
    noise, velocity_noise = 5e-3, "uniform"

    def bind(self, batch):
        super().bind(batch)
        # a row of the batch begins with time, qpos and qvel (mjtState): all but x and height
        self.angles_and_velocities = batch.state[:, 3 : 1 + self.model.nq + self.model.nv]
        self.limits = np.array([0.2] + [100.0] * (self.angles_and_velocities.shape[1] - 1))  # the first is the torso's

    def unhealthy(self):
        return ~((np.abs(self.angles_and_velocities) < self.limits).all(axis=1) & (self.qpos[:, 1] > 0.7))


class Walker2d(Hopper):
    model_file = "walker2d.xml"

    def unhealthy(self):
        height, angle = self.qpos[:, 1], self.qpos[:, 2]
        return ~((height > 0.8) & (height < 2.0) & (np.abs(angle) < 1.0))


class Humanoid(Task):
    model_file, hidden_positions, contact_forces = "humanoid.xml", 2, True
    forward_weight, alive = 1.25, 5.0
    noise, velocity_noise = 1e-2, "uniform"

    def bind(self, batch):
        super().bind(batch)
        derived = [batch.bind(name).reshape(batch.nsim, -1) for name in ("cinert", "cvel", "qfrc_actuator")]
        self.state_parts[2:2] = derived
        self.x = batch.bind("xipos")[:, :, 0]
        self.mass_share = self.model.body_mass / self.model.body_mass.sum()

    def position(self):
        return np.vecdot(self.x, self.mass_share)  # row by row: the rounding of a product depends on num_envs

    def unhealthy(self):
        height = self.qpos[:, 2]
        return ~((height > 1.0) & (height < 2.0))


class HumanoidStandup(Humanoid):
    """Rewarded for the height of its torso, over the time of one simulation step as in Gymnasium."""

    model_file, alive = "humanoidstandup.xml", 1.0

    def reward(self, before, after, ctrl):
        return self.qpos[:, 2] / self.model.opt.timestep - self.control_cost * np.vecdot(ctrl, ctrl) + self.alive

    unhealthy = Task.unhealthy  # it starts on the floor


class Reacher(Task):
    """Rewarded for the nearness of its fingertip to a target, as it was before the step, as in Gymnasium."""

    model_file, frame_skip = "reacher.xml", 2

    def bind(self, batch):
        super().bind(batch)
        xpos = batch.bind("xpos")
        self.fingertip, self.target = (xpos[:, self.model.body(name).id] for name in ("fingertip", "target"))

    def state(self):
        angles = self.qpos[:, :2]
        parts = [np.cos(angles), np.sin(angles), self.qpos[:, 2:], self.qvel[:, :2], self.fingertip - self.target]
        return np.concatenate(parts, axis=1)

    def position(self):
        return np.linalg.norm(self.fingertip - self.target, axis=1)

    def reward(self, before, after, ctrl):
        return -before - np.vecdot(ctrl, ctrl)

    def sample(self, rng):
        qpos = rng.uniform(-0.1, 0.1, self.model.nq) + self.model.qpos0
        goal = rng.uniform(-0.2, 0.2, 2)
        while np.linalg.norm(goal) >= 0.2:
            goal = rng.uniform(-0.2, 0.2, 2)
        qvel = rng.uniform(-0.005, 0.005, self.model.nv)
        qpos[-2:], qvel[-2:] = goal, 0
        return qpos, qvel


# ---- Who controls which joints: a text a partition, agents divided by "|", joints by spaces ----
_UPPER = "left_shoulder1 left_shoulder2 abdomen_x abdomen_y abdomen_z right_shoulder1 right_shoulder2"
_UPPER += " right_elbow left_elbow"
_LEGS = "left_hip_x left_hip_y left_hip_z right_hip_x right_hip_y right_hip_z right_knee left_knee"
_HUMANOID = {"9|8": f"{_UPPER} | {_LEGS}", "17x1": f"{_UPPER} {_LEGS}".replace(" ", " | ")}
_CHEETAH = "bthigh bshin bfoot fthigh fshin ffoot"
PARTITIONS = {
    Ant: {
        "2x4": "hip_1 ankle_1 hip_2 ankle_2 | hip_3 ankle_3 hip_4 ankle_4",
        "2x4d": "hip_1 ankle_1 hip_3 ankle_3 | hip_2 ankle_2 hip_4 ankle_4",
        "4x2": "hip_1 ankle_1 | hip_2 ankle_2 | hip_3 ankle_3 | hip_4 ankle_4",
        "8x1": "hip_1 | ankle_1 | hip_2 | ankle_2 | hip_3 | ankle_3 | hip_4 | ankle_4",
    },
    HalfCheetah: {
        "2x3": "bfoot bshin bthigh | ffoot fshin fthigh",
        "3x2": "bfoot bshin | bthigh ffoot | fshin fthigh",
        "6x1": "bfoot | bshin | bthigh | ffoot | fshin | fthigh",
    },
    Hopper: {"3x1": "thigh_joint | leg_joint | foot_joint"},
    Walker2d: {
        "2x3": "foot_joint leg_joint thigh_joint | foot_left_joint leg_left_joint thigh_left_joint",
        "3x2": "foot_joint leg_joint | thigh_joint foot_left_joint | leg_left_joint thigh_left_joint",
        "6x1": "foot_joint | leg_joint | thigh_joint | foot_left_joint | leg_left_joint | thigh_left_joint",
    },
    Humanoid: _HUMANOID,
    HumanoidStandup: _HUMANOID,
    Reacher: {"2x1": "joint0 | joint1"},
    Swimmer: {"2x1": "motor1_rot | motor2_rot"},
    CoupledHalfCheetah: {"1p1": f"{_CHEETAH} | second_{_CHEETAH.replace(' ', ' second_')}"},
}
TASKS = {
    "Ant-v2": Ant,
    "HalfCheetah-v2": HalfCheetah,
    "Hopper-v2": Hopper,
    "Walker2d-v2": Walker2d,
    "Humanoid-v2": Humanoid,
    "HumanoidStandup-v2": HumanoidStandup,
    "Reacher-v2": Reacher,
    "Swimmer-v2": Swimmer,
    "coupled_half_cheetah": CoupledHalfCheetah,
    "manyagent_swimmer": ManyAgentSwimmer,
    "manyagent_ant": ManyAgentAnt,
}
JOINTS_PER_SEGMENT = {  # of the robots that come in any size NxM: N agents of M segments each
    ManyAgentSwimmer: "rot{0}",
    ManyAgentAnt: "hip1_{0} ankle1_{0} hip2_{0} ankle2_{0}",
}


def parse_env_id(env_id):
    """The task's class, its number of segments and each agent's joints: (class, int, list of lists of names).

    Raises ValueError, naming the id and listing what there is, for an unknown id or partition.
    """
    name, _, partition = str(env_id).rpartition("-")
    if name not in TASKS:
        known = [f"{task}-{part}" for task, kind in TASKS.items() for part in PARTITIONS.get(kind, ["NxM"])]
        raise ValueError(f"unknown env id {env_id!r}; there are {', '.join(known)}")
    task = TASKS[name]
    if task in JOINTS_PER_SEGMENT:
        match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", partition, re.ASCII)
        if not match or int(match[1]) * int(match[2]) > 1000:  # MuJoCo compiles no longer chains
            sizes = "NxM: N agents of M segments, 1 to 99 each and 1000 in all"
            raise ValueError(f"unknown partition {partition!r} in {env_id!r}; {name} takes {sizes}")
        agents, each = int(match[1]), int(match[2])
        owned = [range(agent * each, (agent + 1) * each) for agent in range(agents)]
        segment = JOINTS_PER_SEGMENT[task]
        return task, agents * each, [" ".join(segment.format(i) for i in own).split() for own in owned]
    if partition not in PARTITIONS[task]:
        raise ValueError(f"unknown partition {partition!r} in {env_id!r}; {name} has {', '.join(PARTITIONS[task])}")
    return task, 0, [joints.split() for joints in PARTITIONS[task][partition].split("|")]


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
    Raises ValueError for an unknown id or an impossible number, naming it.

    Attributes:
      num_agents: N; state_size: S; state: (E, S) float64, the current one
      single_action_space: Box (N, act): the controls' bounds; agents with fewer joints than the others are padded
        with actions that go nowhere, whose bounds are 0
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, env_id, num_envs, seed=0, num_threads=0, episode_limit=1000):
        super().__init__()
        task, segments, agents = parse_env_id(env_id)
        limits = (("num_envs", num_envs, 1), ("num_threads", num_threads, 0), ("episode_limit", episode_limit, 1))
        for name, value, least in limits:
            if not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
        self.env_id, self.num_envs, self.num_agents, self.episode_limit = env_id, num_envs, len(agents), episode_limit
        self.task = task(segments)
        model = self.task.model
        self.batch = Batch(model, num_envs, min(num_threads or os.cpu_count(), num_envs))
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

        self._seed(seed)
        self._returns, self._lengths, self._num_unstable = np.zeros(num_envs), np.zeros(num_envs, int), 0
        self.state = self._start(np.arange(num_envs))
        self._seed(seed)  # so that the first reset() starts where reset(seed=seed) does
        self.state_size = self.state.shape[1]
        self.single_action_space = Box(*bounds)
        self.action_space = Box(*np.repeat(bounds[:, None], num_envs, axis=1))
        obs_shape = (num_envs, self.num_agents, self.state_size + self.num_agents)
        self.single_observation_space = Box(-np.inf, np.inf, obs_shape[1:])
        self.observation_space = Box(-np.inf, np.inf, obs_shape)

    def _seed(self, seed):
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"seed is {seed!r}, expected an integer of at least 0")
        self._rngs = [np.random.default_rng([seed, i]) for i in range(self.num_envs)]

    def _start(self, ids):
        """Begin an episode in environments `ids`; return their states (len(ids), S)."""
        self.batch.state[ids] = self._blank  # as mj_resetData
        for i in ids:
            self.task.qpos[i], self.task.qvel[i] = self.task.sample(self._rngs[i])
        self.batch.forward(ids)
        self._returns[ids] = self._lengths[ids] = 0
        self._position = self.task.position()
        return self.task.state()[ids]

    def reset(self, *, seed=None, options=None):
        """Start all environments afresh, from the seed if there is one: obs (E, N, obs) and infos["state"]."""
        if seed is not None:
            self._seed(seed)
        self.state = self._start(np.arange(self.num_envs))
        return agent_observations(self.state, self.num_agents, np.float32), {"state": self.state}

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
            observations = agent_observations(np.concatenate([state, started]), self.num_agents, np.float32)
            infos["final_obs"] = observations[: self.num_envs]
            obs, state = infos["final_obs"].copy(), state.copy()
            obs[ids], state[ids] = observations[self.num_envs :], started
        else:
            infos["final_obs"] = obs = agent_observations(state, self.num_agents, np.float32)
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
