"""Multi-agent MuJoCo: robots whose joints are divided among agents, as one vector environment.

    envs = MaMuJoCoVecEnv("Ant-v2-4x2", num_envs=10, seed=1)  # 4 agents of 2 joints each
    obs, infos = envs.reset()                                 # obs (E, N, O) float32
    actions = envs.action_space.sample()                      # (E, N, act) float32
    obs, reward, terminated, truncated, infos = envs.step(actions)
    envs.close()                                              # ends the threads

E environments, N agents, S numbers in the state, O numbers in an agent's observation. One call of mujoco.batch.Batch
steps all environments on a pool of threads. Each agent observes the full state and its own id (O = S + N) or, with
agent_obsk, the part of the state that is near its joints. `python mamujoco_env.py` prints all env ids.

The v5 tasks are Gymnasium's. The v2 tasks are Gymnasium's v4 tasks with contact forces and their costs set to zero,
as v2 on MuJoCo 2 reported them. Peng et al. 2021 ("FACMAC", arXiv:2003.06709) introduced multi-agent MuJoCo.

step returns reward, terminated and truncated (E,), and:
  obs                    (E, N, O) float32: each agent's observation, after automatic resets
  infos["state"]         (E, S) float64: the state, after automatic resets
  infos["final_obs"]     (E, N, O), infos["final_state"] (E, S): the same before automatic resets, in every environment;
                         a replay buffer stores final_state as the next state
  infos["_final_obs"]    (E,) bool: True where this step ended an episode and reset the environment
  infos["episode"]       {"r": returns (E,), "l": lengths (E,)}, valid where infos["_episode"] (E,) is True;
                         both keys are missing if this step ended no episode
  infos["unstable"]      number of episodes so far that ended because the simulation became unstable
The environment never changes an array that it has returned. Some are the same array (obs and final_obs, if nothing was
reset): copy before you change one in place. Start processes (torch's DataLoader, Gymnasium's AsyncVectorEnv) by "spawn"
or "forkserver", not by "fork": the pool's threads do not survive a fork.

The task decides when an episode terminates. An unstable simulation terminates it too: the reward is then 0 and the
final state is the last good one. An episode is truncated after `episode_limit` steps. Environment i draws its resets
from default_rng([seed, i]), so its trajectory depends only on the seed, i and its own actions.
A wrong env id or number raises EnvError, which is a ValueError. Wrong actions and states raise plain ValueErrors. A
call after close() raises Gymnasium's ClosedEnvironmentError.
"""

import difflib
import itertools
import os
import re
import warnings

import gymnasium
import mujoco
import numpy as np
from gymnasium.error import ClosedEnvironmentError
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from mujoco.batch import Batch, SimulationError

# ---- Robots: Gymnasium's XML files; the robots that Gymnasium lacks are built in code ----
ASSETS = os.path.join(os.path.dirname(gymnasium.__file__), "envs", "mujoco", "assets")
HINGE, SLIDE = mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE


def compile_quietly(spec):
    """Compile, and hide the warning that settotalmass is deprecated: Gymnasium's half-cheetah uses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spec.compile()


def _empty_spec():
    """A world with a light, and a floor that everything collides with. Angles in degrees, RK4, time steps of 5 ms."""
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
    """A swimmer: a head and `segments` bodies in a chain, with a motor between neighbours."""
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
    """An ant whose spine has `segments` segments, rigidly joined. Each has two legs with a hip and an ankle."""
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
            foot.add_joint(name=f"ankle{leg}_{i}", axis=[-side if i == 0 else side, 1, 0], range=bend, **joint)
            _capsule(foot, end=(2 * x, 0.4 * side, 0), radius=0.08, density=5, **skin)
            _motor(spec, f"hip{leg}_{i}")
            _motor(spec, f"ankle{leg}_{i}")
    return spec.compile()


def build_coupled_half_cheetah(segments):
    """Two of Gymnasium's half-cheetahs side by side. A spatial tendon ties their torsos together."""
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
    return compile_quietly(spec)  # the file sets a total mass of 14, which is now the mass of both together


# ---- Tasks: state, reward and termination of all environments at once ----
class Task:
    """A robot that is rewarded for moving forward. The other tasks are subclasses.

    Attributes:
      model_file: Gymnasium's XML file of the robot
      frame_skip, episode_limit: simulation steps per environment step; default limit of environment steps per episode
      fields: arrays of MjData that form the state, concatenated; an agent observes them for its own joints
      hidden_positions: the state leaves out this many of the first positions
      derived: True if the task reads more than positions and velocities; a reset then has MuJoCo compute the rest
      first_body: first body whose numbers are in the state; v5 leaves out the world, body 0
      measured: True if contact forces come from the simulation, as in v5; False if they are zero, as in v2
      force_limit: contact forces are clipped to +- this
      forward_weight, control_cost, alive: reward = forward_weight * velocity - control_cost * |ctrl|^2 + alive
      alive_when_unhealthy: True if the step that terminates an episode still earns `alive`
      contact_cost, contact_cost_limit: the reward loses contact_cost * |forces|^2, at most the limit
      noise, velocity_noise: resets add U(-noise, noise) to positions, and the same ("uniform") or N(0, noise)
        ("normal") to velocities
      partitions: {name: names of each agent's joints}; "|" separates agents
      neighbours: the joint graph; "|" separates cliques, and all joints of a clique are neighbours
      segment_joints: for robots of any size: the joints of segment i. Then `neighbours` has the cliques that segment i
        adds, and `partitions` names one size as an example
    """

    model_file: str
    frame_skip, episode_limit = 5, 1000
    fields, hidden_positions = ("qpos", "qvel"), 1
    derived, first_body, measured = True, 0, False
    forward_weight, control_cost, alive, alive_when_unhealthy = 1.0, 0.1, 0.0, True
    force_limit, contact_cost, contact_cost_limit = np.inf, 0.0, np.inf
    noise, velocity_noise = 0.1, "normal"
    partitions, neighbours, segment_joints = {}, "", ""

    def __init__(self, segments):
        self.segments, self.model = segments, self.build(segments)
        self.dt = self.model.opt.timestep * self.frame_skip  # seconds

    def build(self, segments):
        return compile_quietly(mujoco.MjSpec.from_file(os.path.join(ASSETS, self.model_file)))

    def left_out(self, field):
        """How many of the field's first numbers the state leaves out: positions, or numbers of the first bodies."""
        if field == "qpos":
            return self.hidden_positions
        return {"qvel": 0, "cinert": 10, "cvel": 6, "cfrc_ext": 6, "qfrc_actuator": 6}[field] * self.first_body

    def bind(self, batch):
        """Keep views of the batch's arrays. Each call of the batch updates them in place."""
        self.qpos, self.qvel = batch.bind("qpos"), batch.bind("qvel")
        self.forces = np.zeros((batch.nsim, self.model.nbody, 6))
        self.scratch = mujoco.MjData(self.model)
        arrays = {name: self.forces if name == "cfrc_ext" else batch.bind(name) for name in self.fields}
        self.state_parts = [array.reshape(batch.nsim, -1)[:, self.left_out(name) :] for name, array in arrays.items()]

    def measure_forces(self, batch):
        """Compute the contact forces after a step as Gymnasium does: by mj_rnePostConstraint, which a batch omits."""
        # a sensor would compute the forces in every simulation step and, under RK4, at another stage
        for i in range(batch.nsim):
            batch.get_data(i, self.scratch)
            mujoco.mj_rnePostConstraint(self.model, self.scratch)
            self.forces[i] = self.scratch.cfrc_ext
        np.clip(self.forces, -self.force_limit, self.force_limit, out=self.forces)

    def state(self):
        """The state (E, S) float64, a new array."""
        return np.concatenate(self.state_parts, axis=1)

    def position(self):
        """(E,) in metres, a new array: the position whose change over a step gives the forward velocity."""
        return self.qpos[:, 0].copy()

    def progress(self, before, after):
        """The reward's first term (E,), from the positions (E,) before and after the step."""
        return (after - before) * (self.forward_weight / self.dt)

    def reward(self, before, after, ctrl, unhealthy):
        """The reward (E,), from positions (E,) before and after the step, controls (E, nu) and unhealthy()."""
        reward = np.vecdot(ctrl, ctrl)
        reward *= -self.control_cost
        reward += self.progress(before, after)
        if self.alive:
            reward += self.alive if self.alive_when_unhealthy else self.alive * ~unhealthy
        if self.contact_cost:
            squares = np.square(self.forces).sum((1, 2))
            reward -= np.minimum(self.contact_cost * squares, self.contact_cost_limit)
        return reward

    def unhealthy(self):
        """(E,) bool, a new array: True where the episode terminates."""
        return np.zeros(len(self.qpos), bool)

    def sample(self, rng):
        """Draw the positions (nq,) and velocities (nv,) that an episode starts with."""
        qpos = self.model.qpos0 + rng.uniform(-self.noise, self.noise, self.model.nq)
        if self.velocity_noise == "normal":
            return qpos, self.noise * rng.standard_normal(self.model.nv)
        return qpos, rng.uniform(-self.noise, self.noise, self.model.nv)

    # ---- partial observations: columns of the state ----
    def layout(self):
        """{field: columns of the state}, in the field's shape in one simulation; -1: not part of the state."""
        columns, size = {}, 0
        for name in self.fields:
            field, out = getattr(self.scratch, name), self.left_out(name)
            columns[name] = np.arange(size - out, size - out + field.size).reshape(field.shape)
            columns[name].flat[:out] = -1
            size += field.size - out
        return columns

    def joint_columns(self, joint, field, columns, seen):
        """Columns that a joint's `field` adds to an observation. `seen`: (field, body) pairs already included."""
        joint = self.model.joint(joint)
        if field == "qpos":
            return [columns["qpos"][joint.qposadr[0]]]
        if field in ("qvel", "qfrc_actuator"):
            return [columns[field][joint.dofadr[0]]]
        new = [body for body in self.bodies_of(joint.name) if (field, body) not in seen]
        seen.update((field, body) for body in new)
        return [column for body in new for column in columns[field][body]]

    def common_columns(self, columns):
        """Columns that all agents see: positions and velocities of the root joints, which have no motor."""
        driven = self.model.actuator_trnid[:, 0]
        qpos = np.delete(columns["qpos"], self.model.jnt_qposadr[driven])
        return [*qpos, *np.delete(columns["qvel"], self.model.jnt_dofadr[driven])]

    def observed(self, joints, distance):
        """Columns of the state that the agent of these joints observes, as in MaMuJoCo's agent_obsk (Peng et al. 2021).

        All fields of its own joints, then the positions of joints at 1, 2, ..., `distance` steps in the joint graph,
        then the columns that all agents see. Joints at the same distance are sorted by name.
        """
        cliques = [self.neighbours.format(i=i, before=max(i - 1, 0)) for i in range(self.segments or 1)]
        cliques = [clique.split() for clique in " | ".join(cliques).split("|")]
        columns, seen, found = self.layout(), set(), []
        ring, reached = set(joints), set(joints)
        for step in range(min(distance, self.model.njnt) + 1):  # no joint is further away
            for joint in sorted(ring):
                for field in self.fields if step == 0 else ("qpos",):
                    found += self.joint_columns(joint, field, columns, seen)
            ring = {joint for clique in cliques if ring & set(clique) for joint in clique} - reached
            reached |= ring
        return [int(column) for column in found + self.common_columns(columns) if column >= 0]


class Ant(Task):
    model_file, hidden_positions, fields = "ant.xml", 2, ("qpos", "qvel", "cfrc_ext")
    control_cost, alive = 0.5, 1.0
    partitions = {
        "2x4": "hip_1 ankle_1 hip_2 ankle_2 | hip_3 ankle_3 hip_4 ankle_4",
        "2x4d": "hip_1 ankle_1 hip_3 ankle_3 | hip_2 ankle_2 hip_4 ankle_4",
        "4x2": "hip_1 ankle_1 | hip_2 ankle_2 | hip_3 ankle_3 | hip_4 ankle_4",
        "8x1": "hip_1 | ankle_1 | hip_2 | ankle_2 | hip_3 | ankle_3 | hip_4 | ankle_4",
    }
    neighbours = f"{partitions['4x2']} | hip_1 hip_2 hip_3 hip_4"

    def bind(self, batch):
        super().bind(batch)
        self.x = batch.bind("xpos")[:, 1, 0]  # of the torso, as in Gymnasium; one simulation step behind qpos

    def position(self):
        return self.x.copy()

    def unhealthy(self):
        return (self.qpos[:, 2] < 0.2) | (self.qpos[:, 2] > 1.0)

    def bodies_of(self, joint):
        """A hip's agent sees forces on the torso and the leg's first part; an ankle's, on the leg's three parts."""
        own, parent = self.model.joint(joint).bodyid[0], self.model.body_parentid
        inner = [parent[parent[own]], parent[own]]
        return inner if joint.startswith("hip") else [*inner, own]


class AntV5(Ant):
    first_body, measured, force_limit = 1, True, 1.0
    contact_cost, alive_when_unhealthy = 5e-4, False


class ManyAgentAnt(Ant):
    frame_skip, build = 4, staticmethod(build_ant)
    partitions, segment_joints = {"2x3": ""}, "hip1_{i} ankle1_{i} hip2_{i} ankle2_{i}"
    neighbours = "hip1_{i} ankle1_{i} | hip2_{i} ankle2_{i} | hip1_{i} hip2_{i}"
    neighbours += " | hip1_{before} hip2_{before} hip1_{i} hip2_{i}"


class HalfCheetah(Task):
    model_file, derived = "half_cheetah.xml", False
    partitions = {
        "2x3": "bfoot bshin bthigh | ffoot fshin fthigh",
        "3x2": "bfoot bshin | bthigh ffoot | fshin fthigh",
        "6x1": "bfoot | bshin | bthigh | ffoot | fshin | fthigh",
    }
    neighbours = "bfoot bshin | bshin bthigh | bthigh fthigh | fthigh fshin | fshin ffoot"


class CoupledHalfCheetah(HalfCheetah):
    build = staticmethod(build_coupled_half_cheetah)
    control_cost = 0.05  # 0.1 |ctrl|^2, averaged over both cheetahs
    partitions = {"1p1": "bthigh bshin bfoot fthigh fshin ffoot | second_bthigh second_bshin second_bfoot"}
    partitions["1p1"] += " second_fthigh second_fshin second_ffoot"
    neighbours = re.sub(r"(\w+)", r"second_\1", HalfCheetah.neighbours) + f" | {HalfCheetah.neighbours}"

    def position(self):
        return (self.qpos[:, 0] + self.qpos[:, self.model.nq // 2]) / 2


class Swimmer(Task):
    model_file, derived, frame_skip, hidden_positions = "swimmer.xml", False, 4, 2
    control_cost, velocity_noise = 1e-4, "uniform"
    partitions, neighbours = {"2x1": "motor1_rot | motor2_rot"}, "motor1_rot motor2_rot"

    def joint_columns(self, joint, field, columns, seen):
        found = super().joint_columns(joint, field, columns, seen)
        if field == "qvel":  # as published: motor 1's agent also sees the root's velocity along x, motor 2's along y
            found.insert(0, columns["qvel"][self.model.joint(joint).dofadr[0] - 3])
        return found

    def common_columns(self, columns):
        return [columns["qpos"][2], columns["qvel"][2]]


class ManyAgentSwimmer(Swimmer):
    build = staticmethod(build_swimmer)
    partitions, segment_joints, neighbours = {"10x2": ""}, "rot{i}", "rot{before} rot{i}"
    joint_columns = Task.joint_columns

    def common_columns(self, columns):
        return []


class Hopper(Task):
    model_file, derived, frame_skip = "hopper.xml", False, 4
    control_cost, alive, noise, velocity_noise = 1e-3, 1.0, 5e-3, "uniform"
    partitions = {"3x1": "thigh_joint | leg_joint | foot_joint"}
    neighbours = "foot_joint leg_joint | leg_joint thigh_joint"

    def bind(self, batch):
        super().bind(batch)
        # a row of batch.state begins with time, x and height; then come the angles and all velocities
        self.angles_and_velocities = batch.state[:, 3 : 1 + self.model.nq + self.model.nv]
        self.limits = np.array([0.2] + [100.0] * (self.angles_and_velocities.shape[1] - 1))  # 0.2: the torso's angle

    def state(self):
        state = super().state()
        velocities = state[:, -self.model.nv :]
        velocities.clip(-10.0, 10.0, out=velocities)
        return state

    def unhealthy(self):
        return ~((np.abs(self.angles_and_velocities) < self.limits).all(axis=1) & (self.qpos[:, 1] > 0.7))


class HopperV5(Hopper):
    alive_when_unhealthy = False


class Walker2d(Hopper):
    model_file = "walker2d.xml"
    partitions = {
        "2x3": "foot_joint leg_joint thigh_joint | foot_left_joint leg_left_joint thigh_left_joint",
        "3x2": "foot_joint leg_joint | thigh_joint foot_left_joint | leg_left_joint thigh_left_joint",
        "6x1": "foot_joint | leg_joint | thigh_joint | foot_left_joint | leg_left_joint | thigh_left_joint",
    }
    neighbours = f"{Hopper.neighbours} | foot_left_joint leg_left_joint | leg_left_joint thigh_left_joint"
    neighbours += " | thigh_joint thigh_left_joint"

    def unhealthy(self):
        height, angle = self.qpos[:, 1], self.qpos[:, 2]
        return ~((height > 0.8) & (height < 2.0) & (np.abs(angle) < 1.0))


class Walker2dV5(Walker2d):
    model_file, alive_when_unhealthy = "walker2d_v5.xml", False


_UPPER = "left_shoulder1 left_shoulder2 abdomen_x abdomen_y abdomen_z right_shoulder1 right_shoulder2"
_UPPER += " right_elbow left_elbow"
_LOWER = "left_hip_x left_hip_y left_hip_z right_hip_x right_hip_y right_hip_z right_knee left_knee"
_SIDE = "{0}_elbow {0}_shoulder1 {0}_shoulder2 | {0}_shoulder1 {0}_shoulder2 abdomen_x abdomen_y abdomen_z"
_SIDE += " | abdomen_x abdomen_y abdomen_z {0}_hip_x {0}_hip_y {0}_hip_z | {0}_knee {0}_hip_x {0}_hip_y {0}_hip_z"


class Humanoid(Task):
    model_file, hidden_positions = "humanoid.xml", 2
    fields = ("qpos", "qvel", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    forward_weight, alive, noise, velocity_noise = 1.25, 5.0, 1e-2, "uniform"
    partitions = {"9|8": f"{_UPPER} | {_LOWER}", "17x1": f"{_UPPER} {_LOWER}".replace(" ", " | ")}
    neighbours = f"{_SIDE.format('left')} | {_SIDE.format('right')}"
    bodies = {  # a joint's agent sees the inertia and velocity of these bodies; key: second word of the joint's name
        "x": "pelvis right_thigh left_thigh", "y": "torso lwaist pelvis", "z": "torso lwaist pelvis",
        "hip": "{0}_thigh {0}_shin", "knee": "{0}_shin {0}_foot", "elbow": "{0}_lower_arm",
    }  # fmt: skip
    bodies["shoulder1"] = bodies["shoulder2"] = "torso {0}_upper_arm {0}_lower_arm"

    def bind(self, batch):
        super().bind(batch)
        self.x = batch.bind("xipos")[:, :, 0]
        self.mass_share = self.model.body_mass / self.model.body_mass.sum()

    def position(self):
        return np.vecdot(self.x, self.mass_share)  # not @: the rounding of a matrix product depends on num_envs

    def unhealthy(self):
        return ~((self.qpos[:, 2] > 1.0) & (self.qpos[:, 2] < 2.0))

    def bodies_of(self, joint):
        side, part = joint.split("_")[:2]
        return [self.model.body(name).id for name in self.bodies[part].format(side).split()]


class HumanoidV5(Humanoid):
    first_body, measured, alive_when_unhealthy = 1, True, False
    contact_cost, contact_cost_limit = 5e-7, 10.0


class HumanoidStandup(Humanoid):
    """Rewarded for the height of its torso, divided by the time of one simulation step as in Gymnasium."""

    model_file, alive = "humanoidstandup.xml", 1.0

    def progress(self, before, after):
        return self.qpos[:, 2] / self.model.opt.timestep

    unhealthy = Task.unhealthy  # never unhealthy: it starts on the floor


class HumanoidStandupV5(HumanoidStandup):
    first_body, measured = 1, True
    contact_cost, contact_cost_limit = 5e-7, 10.0


class Reacher(Task):
    """Rewarded with minus the distance from fingertip to target, measured before the step as in Gymnasium."""

    model_file, frame_skip, episode_limit, control_cost = "reacher.xml", 2, 50, 1.0
    fields = ("qpos", "qvel", "fingertip")
    partitions, neighbours = {"2x1": "joint0 | joint1"}, "joint0 joint1"
    distances = 3  # coordinates of the distance in the state: x, y, z

    def bind(self, batch):
        self.qpos, self.qvel, xpos = batch.bind("qpos"), batch.bind("qvel"), batch.bind("xpos")
        self.fingertip, self.target = (xpos[:, self.model.body(name).id] for name in ("fingertip", "target"))

    def state(self):
        angles, distance = self.qpos[:, :2], (self.fingertip - self.target)[:, : self.distances]
        parts = [np.cos(angles), np.sin(angles), self.qpos[:, 2:], self.qvel[:, :2], distance]
        return np.concatenate(parts, axis=1)

    def position(self):
        return np.linalg.norm(self.fingertip - self.target, axis=1)

    def progress(self, before, after):
        return -before

    def sample(self, rng):
        qpos = rng.uniform(-0.1, 0.1, self.model.nq) + self.model.qpos0
        while np.linalg.norm(goal := rng.uniform(-0.2, 0.2, 2)) >= 0.2:
            pass
        qvel = rng.uniform(-0.005, 0.005, self.model.nv)
        qpos[-2:], qvel[-2:] = goal, 0
        return qpos, qvel

    def layout(self):
        return {}

    def joint_columns(self, joint, field, columns, seen):
        index = self.model.joint(joint).id  # sine before cosine, as published
        known = {"qpos": [2 + index, index], "qvel": [6 + index]}
        return known[field] if field in known else [8, 9, 10][: self.distances] if index == 1 else []

    def common_columns(self, columns):
        return [4, 5]  # the target


class ReacherV5(Reacher):
    """Like Reacher, but the distance is measured after the step."""

    distances = 2

    def progress(self, before, after):
        return -after


class PusherV5(Task):
    """Rewarded with minus the distances from object to goal and, at half the weight, from object to the arm's tip."""

    model_file, episode_limit, control_cost = "pusher_v5.xml", 100, 0.1
    partitions = {"3p": "r_shoulder_pan_joint r_shoulder_lift_joint r_upper_arm_roll_joint | r_elbow_flex_joint"}
    partitions["3p"] += " | r_forearm_roll_joint r_wrist_flex_joint r_wrist_roll_joint"
    neighbours = " | ".join(map(" ".join, itertools.pairwise(partitions["3p"].replace("|", "").split())))

    def bind(self, batch):
        self.qpos, self.qvel, xpos = batch.bind("qpos"), batch.bind("qvel"), batch.bind("xpos")
        tip_object_goal = (xpos[:, self.model.body(name).id] for name in ("tips_arm", "object", "goal"))
        self.tip, self.object, self.goal = tip_object_goal

    def state(self):
        return np.concatenate([self.qpos[:, :7], self.qvel[:, :7], self.tip, self.object, self.goal], axis=1)

    def reward(self, before, after, ctrl, unhealthy):
        near = np.linalg.norm(self.object - self.tip, axis=1)
        far = np.linalg.norm(self.object - self.goal, axis=1)
        return -far - self.control_cost * np.vecdot(ctrl, ctrl) - 0.5 * near

    def sample(self, rng):
        place = np.zeros(2)
        while np.linalg.norm(place) <= 0.17:
            place = np.array([rng.uniform(-0.3, 0.0), rng.uniform(-0.2, 0.2)])
        qpos, qvel = self.model.qpos0.copy(), rng.uniform(-0.005, 0.005, self.model.nv)
        qpos[-4:-2], qpos[-2:], qvel[-4:] = place, 0, 0
        return qpos, qvel

    def layout(self):
        return {"qpos": np.arange(7), "qvel": np.arange(7, 14)}

    def common_columns(self, columns):
        return [*range(14, 23)]  # positions of tip, object and goal


# ---- Env ids ----
TASKS = {
    "Ant-v2": Ant, "Ant-v5": AntV5, "HalfCheetah-v2": HalfCheetah, "HalfCheetah-v5": HalfCheetah,
    "Hopper-v2": Hopper, "Hopper-v5": HopperV5, "Walker2d-v2": Walker2d, "Walker2d-v5": Walker2dV5,
    "Humanoid-v2": Humanoid, "Humanoid-v5": HumanoidV5,
    "HumanoidStandup-v2": HumanoidStandup, "HumanoidStandup-v5": HumanoidStandupV5,
    "Reacher-v2": Reacher, "Reacher-v5": ReacherV5, "Swimmer-v2": Swimmer, "Swimmer-v5": Swimmer,
    "Pusher-v5": PusherV5, "coupled_half_cheetah": CoupledHalfCheetah,
    "manyagent_swimmer": ManyAgentSwimmer, "manyagent_ant": ManyAgentAnt,
}  # fmt: skip
ENV_IDS = [f"{name}-{partition}" for name, task in TASKS.items() for partition in task.partitions]


class EnvError(ValueError):
    """An unknown env id or an impossible number. The message names the value and what was expected."""


def parse_env_id(env_id):
    """The task's class, its number of segments and each agent's joints: (class, int, list of lists of names).

    Raises EnvError for an unknown id or partition. The message names similar ids, or the robot's partitions.
    """
    name, _, partition = str(env_id).rpartition("-")
    if name not in TASKS:
        wrong = str(env_id).lower()[:99]
        score = {known: difflib.SequenceMatcher(None, known.lower(), wrong).ratio() for known in ENV_IDS}
        least = max(0.4, 0.8 * max(score.values()))
        nearest = sorted((known for known in score if score[known] > least), key=score.get, reverse=True)[:3]
        expected = f", expected one such as {', '.join(nearest)}" if nearest else ""
        raise EnvError(f"unknown env id {env_id!r}{expected}; `python mamujoco_env.py` prints all")
    task = TASKS[name]
    if task.segment_joints:
        match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", partition, re.ASCII)
        if not match or int(match[1]) * int(match[2]) > 1000:  # MuJoCo fails to compile longer chains
            sizes = "NxM, such as 10x2: N agents of M segments each, both from 1 to 99, at most 1000 segments"
            raise EnvError(f"unknown partition {partition!r} in {env_id!r}; {name} takes {sizes}")
        agents, each = int(match[1]), int(match[2])
        joints = [task.segment_joints.format(i=i).split() for i in range(agents * each)]
        return task, len(joints), [sum(joints[i : i + each], []) for i in range(0, len(joints), each)]
    if partition not in task.partitions:
        raise EnvError(f"unknown partition {partition!r} in {env_id!r}; {name} has {', '.join(task.partitions)}")
    return task, 0, [joints.split() for joints in task.partitions[partition].split("|")]


# ---- What critic and agents see of a state: NumPy arrays or torch tensors with any leading dimensions ----
def standardise(x):
    """(x - mean) / std over the last axis. (..., S) -> (..., S)."""
    size = x.shape[-1]  # sum / size: NumPy's mean takes three times as long on few numbers
    centred = x - x.sum(axis=-1, keepdims=True) / size
    variance = (centred * centred).sum(axis=-1, keepdims=True) / size
    return centred / (variance + 1e-30) ** 0.5  # 1e-30 keeps a constant vector finite


def critic_state(state):
    """The critic sees the standardised state. (..., S) -> (..., S)."""
    return standardise(state)


def agent_observations(state, num_agents, dtype=None, columns=None):
    """Each agent sees its part of the state and its one-hot id, standardised together.

    (..., S) -> (..., N, O), on the state's device, in `dtype` or the state's. Without `columns`, agents see the whole
    state: O = S + N. With MaMuJoCoVecEnv's `columns` (N, W), agent i sees the columns in row i: O = W + N. Entries of
    -1 pad the shorter rows and are observed as 0.
    """
    new_zeros = np.zeros if isinstance(state, np.ndarray) else state.new_zeros
    width = state.shape[-1] if columns is None else columns.shape[-1]
    total = width + num_agents
    obs = new_zeros((*state.shape[:-1], num_agents, total), dtype=dtype or state.dtype)
    if columns is None:
        # all agents' vectors hold the same numbers in another order: standardise agent 0's, then copy from it
        first = new_zeros((*state.shape[:-1], total), dtype=state.dtype)
        first[..., :width], first[..., width] = state, 1.0
        first = standardise(first)
        obs[..., :width] = first[..., None, :width]
        obs[..., width:] = first[..., None, -1:]
        # with all agents' vectors concatenated, the ones of their ids are total + 1 apart
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
def usable_cpus():
    """The number of CPUs that this process may use: a job on a cluster often gets only some CPUs of the machine."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


HUGE = 1e10  # mjMAXVAL: with larger values, MuJoCo calls a simulation unstable


class MaMuJoCoVecEnv(VectorEnv):
    """`num_envs` copies of one multi-agent task. The module's docstring says what reset and step return.

    Args:
      env_id: robot, version, partition, such as "Ant-v2-4x2", "Humanoid-v2-9|8", "manyagent_swimmer-10x2"
      num_envs, seed: E; seed of the resets' noise, until reset(seed=...) replaces it
      num_threads: threads that step the environments; 0: one per CPU that this process may use
      episode_limit: steps after which an episode is truncated; None: the task's limit, 1000 for most tasks
      agent_obsk: None: agents see the full state; K: they see their own joints, the positions of joints up to K steps
        away in the joint graph, and the root, as in MaMuJoCo (details: Task.observed)
    Raises EnvError for an unknown id or an impossible number.

    Attributes:
      num_agents: N; state_size: S; state: the current state (E, S) float64; episode_limit: int
      columns: with agent_obsk (N, W) int: the columns of the state that each agent sees, padded with -1; else None
      single_action_space: Box (N, act) with the bounds of the controls. Agents with fewer joints than others get extra
        actions that do nothing; their bounds are 0
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, env_id, num_envs, seed=0, num_threads=0, episode_limit=None, agent_obsk=None):
        super().__init__()
        task, segments, agents = parse_env_id(env_id)
        episode_limit = task.episode_limit if episode_limit is None else episode_limit
        limits = (("num_envs", num_envs, 1), ("num_threads", num_threads, 0), ("episode_limit", episode_limit, 1))
        limits += () if agent_obsk is None else (("agent_obsk", agent_obsk, 0),)
        for name, value, least in limits:
            if not isinstance(value, int | np.integer) or not least <= value < 2**31:
                raise EnvError(f"{name} is {value!r}, expected an integer of at least {least} and below {2**31}")
        self.env_id, self.num_envs, self.num_agents, self.episode_limit = env_id, num_envs, len(agents), episode_limit
        self.task = task(segments)
        model = self.task.model
        self.batch = Batch(model, num_envs, min(num_threads or usable_cpus(), num_envs), self.task.measured)
        self.task.bind(self.batch)
        self._ctrl = self.batch.bind("ctrl")
        self._blank = self.batch.state[0].copy()  # MuJoCo's initial state
        bad = slice(mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQACC + 1)  # also BADQVEL between them
        self._unstable_warnings = self.batch.warning[:, bad, 1]  # counts

        # actuator j takes element _gather[j] of the agents' concatenated actions
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
            seen = [self.task.observed(joints, agent_obsk) for joints in agents]
            width = max(len(own) for own in seen)
            self.columns = np.array([own + [-1] * (width - len(own)) for own in seen])
        self._seed(seed)
        self._returns, self._lengths, self._num_unstable = np.zeros(num_envs), np.zeros(num_envs, int), 0
        self.state = self._start(np.arange(num_envs))
        self._seed(seed)  # again: the first reset() must start as reset(seed=seed) does
        self.state_size = self.state.shape[1]
        self.single_action_space = Box(*bounds)
        self.action_space = Box(*np.repeat(bounds[:, None], num_envs, axis=1))
        self.observation_space = Box(-np.inf, np.inf, self._observe(self.state).shape)
        self.single_observation_space = Box(-np.inf, np.inf, self.observation_space.shape[1:])

    def _seed(self, seed):
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise EnvError(f"seed is {seed!r}, expected an integer of at least 0")
        self._rngs = [np.random.default_rng([seed, i]) for i in range(self.num_envs)]

    def _observe(self, state):
        return agent_observations(state, self.num_agents, np.float32, self.columns)

    def _start(self, ids):
        """Begin new episodes in environments `ids`. Returns their states (len(ids), S)."""
        self.batch.state[ids] = self._blank  # what mj_resetData does
        for i in ids:
            self.task.qpos[i], self.task.qvel[i] = self.task.sample(self._rngs[i])
        if self.task.derived:
            self.batch.forward(ids)
        if self.task.measured:
            self.task.forces[ids] = 0.0  # as in Gymnasium, until the first step
        self._returns[ids] = self._lengths[ids] = 0
        self._position = self.task.position()
        return self.task.state()[ids]

    def reset(self, *, seed=None, options=None):
        """Start new episodes everywhere, from `seed` if given. Returns obs (E, N, O) and {"state": (E, S)}."""
        if seed is not None:
            self._seed(seed)
        self.state = self._start(np.arange(self.num_envs))
        return self._observe(self.state), {"state": self.state}

    def close_extras(self):
        """End the pool's threads: drop the batch and all views of it, since each view keeps the threads alive."""

        def closed(*_, **__):
            raise ClosedEnvironmentError(f"{self.env_id}: expected no more calls after close()")

        self.batch = self.task = self._ctrl = self._unstable_warnings = None
        self.step = self.reset = self.get_state = self.set_state = closed

    def step(self, actions):
        """Step all environments with actions (E, N, act). Returns what the module's docstring lists.

        Raises ValueError, before it steps anything, if actions have a wrong shape or are not finite.
        """
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions have shape {actions.shape}, expected {self.action_space.shape}: (E, N, act)")
        if np.count_nonzero(np.isfinite(actions)) < actions.size:
            env, agent, k = np.argwhere(~np.isfinite(actions))[0]
            value = actions[env, agent, k]
            raise ValueError(f"action {k} of agent {agent} in environment {env} is {value}, expected a finite number")
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
        terminated = task.unhealthy()
        reward = task.reward(before, after, ctrl, terminated)
        # MuJoCo checks for huge values before each simulation step, so after the last one check here, in one sum
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
            # one call for final and first observations: the overhead of a call is most of its time
            observations = self._observe(np.concatenate([state, started]))
            infos["final_obs"] = observations[: self.num_envs]
            obs, state = infos["final_obs"].copy(), state.copy()
            obs[ids], state[ids] = observations[self.num_envs :], started
        else:
            infos["final_obs"] = obs = self._observe(state)
        infos["state"] = self.state = state
        return obs, reward, terminated, truncated, infos

    def _end_unstable(self, state, reward, terminated):
        """End unstable episodes, in place: reward 0, terminated, and the last good state."""
        bad = self._unstable_warnings.any(axis=1) | (self.batch.status != 0)
        bad |= ~((np.abs(state) < HUGE).all(axis=1) & (np.abs(reward) < HUGE))  # comparing NaN gives False
        state[bad], reward[bad], terminated[bad] = self.state[bad], 0.0, True
        self.batch.warning[bad] = 0
        if not self._num_unstable and bad.any():
            which = np.flatnonzero(bad).tolist()
            warnings.warn(f"{self.env_id}: unstable simulation in environments {which}, episodes ended", stacklevel=3)
        self._num_unstable += int(bad.sum())

    def get_state(self):
        """Copies of everything that later steps depend on, random states too: a dict of arrays and plain values."""
        arrays = {"physics": self.batch.state, "state": self.state, "position": self._position}
        arrays |= {"returns": self._returns, "lengths": self._lengths}
        plain = {"env_id": self.env_id, "unstable": self._num_unstable}
        plain["rngs"] = [rng.bit_generator.state for rng in self._rngs]
        return {name: array.copy() for name, array in arrays.items()} | plain

    def set_state(self, saved):
        """Continue from what get_state returned. Raises ValueError for a state of another env id or num_envs."""
        theirs, ours = (saved["env_id"], len(saved["physics"])), (self.env_id, self.num_envs)
        if theirs != ours:
            raise ValueError(f"the state is from {theirs[1]} x {theirs[0]}, expected {ours[1]} x {ours[0]}")
        self.batch.state[:] = saved["physics"]
        self.state, self._position = saved["state"].copy(), saved["position"].copy()
        self._returns[:], self._lengths[:] = saved["returns"], saved["lengths"]
        self._num_unstable = saved["unstable"]
        for rng, state in zip(self._rngs, saved["rngs"], strict=True):
            rng.bit_generator.state = state


if __name__ == "__main__":
    print(*ENV_IDS, "manyagent_* also in other sizes NxM: N agents of M segments each", sep="\n")
