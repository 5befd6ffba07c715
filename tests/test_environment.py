"""mamujoco_env: against Gymnasium's tasks, MaMuJoCo's observations, written-out numbers, and its own contract."""

import copy
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium_robotics import mamujoco_v1
from mujoco.batch import SimulationError

import kalei_mappo_mamujoco
import kalei_matd3_mamujoco
from experiment.saved_models import evaluate_model, save_model
from mamujoco_env import (
    ENV_IDS,
    EnvError,
    MaMuJoCoVecEnv,
    agent_observations,
    critic_state,
    parse_env_id,
    usable_cpus,
)

SCRIPTS = (kalei_matd3_mamujoco, kalei_mappo_mamujoco)
pytestmark = pytest.mark.filterwarnings("ignore:.*v4 is out of date.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def away_from_the_repository(tmp_path, monkeypatch):
    """MuJoCo writes its log into the working directory."""
    monkeypatch.chdir(tmp_path)


# Who controls which joints, and how many numbers the state has: written out, since the module under test has a
# table of its own that may be wrong.
UPPER = "left_shoulder1 left_shoulder2 abdomen_x abdomen_y abdomen_z right_shoulder1 right_shoulder2 right_elbow"
UPPER += " left_elbow"
LEGS = "left_hip_x left_hip_y left_hip_z right_hip_x right_hip_y right_hip_z right_knee left_knee"
ALONE = [
    *("left_shoulder1", "left_shoulder2", "abdomen_x", "abdomen_y", "abdomen_z"),
    *("right_shoulder1", "right_shoulder2", "right_elbow", "left_elbow"),
    *("left_hip_x", "left_hip_y", "left_hip_z", "right_hip_x", "right_hip_y", "right_hip_z"),
    *("right_knee", "left_knee"),
]
OWNERS = {
    "Ant-v2-2x4": (111, ["hip_1 ankle_1 hip_2 ankle_2", "hip_3 ankle_3 hip_4 ankle_4"]),
    "Ant-v2-2x4d": (111, ["hip_1 ankle_1 hip_3 ankle_3", "hip_2 ankle_2 hip_4 ankle_4"]),
    "Ant-v2-4x2": (111, ["hip_1 ankle_1", "hip_2 ankle_2", "hip_3 ankle_3", "hip_4 ankle_4"]),
    "Ant-v2-8x1": (111, ["hip_1", "ankle_1", "hip_2", "ankle_2", "hip_3", "ankle_3", "hip_4", "ankle_4"]),
    "HalfCheetah-v2-2x3": (17, ["bfoot bshin bthigh", "ffoot fshin fthigh"]),
    "HalfCheetah-v2-3x2": (17, ["bfoot bshin", "bthigh ffoot", "fshin fthigh"]),
    "HalfCheetah-v2-6x1": (17, ["bfoot", "bshin", "bthigh", "ffoot", "fshin", "fthigh"]),
    "Hopper-v2-3x1": (11, ["thigh_joint", "leg_joint", "foot_joint"]),
    "Walker2d-v2-2x3": (
        17,
        ["foot_joint leg_joint thigh_joint", "foot_left_joint leg_left_joint thigh_left_joint"],
    ),
    "Walker2d-v2-3x2": (
        17,
        ["foot_joint leg_joint", "thigh_joint foot_left_joint", "leg_left_joint thigh_left_joint"],
    ),
    "Walker2d-v2-6x1": (
        17,
        ["foot_joint", "leg_joint", "thigh_joint", "foot_left_joint", "leg_left_joint", "thigh_left_joint"],
    ),
    "Humanoid-v2-9|8": (376, [UPPER, LEGS]),
    "Humanoid-v2-17x1": (376, ALONE),
    "HumanoidStandup-v2-9|8": (376, [UPPER, LEGS]),
    "HumanoidStandup-v2-17x1": (376, ALONE),
    "Reacher-v2-2x1": (11, ["joint0", "joint1"]),
    "Swimmer-v2-2x1": (8, ["motor1_rot", "motor2_rot"]),
    "Pusher-v5-3p": (
        23,
        [
            "r_shoulder_pan_joint r_shoulder_lift_joint r_upper_arm_roll_joint",
            "r_elbow_flex_joint",
            "r_forearm_roll_joint r_wrist_flex_joint r_wrist_roll_joint",
        ],
    ),
    "coupled_half_cheetah-1p1": (
        35,
        [
            "bthigh bshin bfoot fthigh fshin ffoot",
            "second_bthigh second_bshin second_bfoot second_fthigh second_fshin second_ffoot",
        ],
    ),
    "manyagent_swimmer-1x1": (6, ["rot0"]),
    "manyagent_swimmer-2x1": (8, ["rot0", "rot1"]),
    "manyagent_swimmer-3x2": (16, ["rot0 rot1", "rot2 rot3", "rot4 rot5"]),
    "manyagent_swimmer-10x2": (44, [f"rot{2 * i} rot{2 * i + 1}" for i in range(10)]),
    "manyagent_ant-1x2": (117, ["hip1_0 ankle1_0 hip2_0 ankle2_0 hip1_1 ankle1_1 hip2_1 ankle2_1"]),
    "manyagent_ant-2x1": (117, ["hip1_0 ankle1_0 hip2_0 ankle2_0", "hip1_1 ankle1_1 hip2_1 ankle2_1"]),
    "manyagent_ant-3x1": (
        167,
        ["hip1_0 ankle1_0 hip2_0 ankle2_0", "hip1_1 ankle1_1 hip2_1 ankle2_1", "hip1_2 ankle1_2 hip2_2 ankle2_2"],
    ),
}
V5_SIZES = {"Ant": 105, "Humanoid": 348, "HumanoidStandup": 348, "Reacher": 10}  # the others' are v2's
OWNERS |= {
    env_id.replace("-v2-", "-v5-"): (V5_SIZES.get(env_id.split("-")[0], size), joints)
    for env_id, (size, joints) in OWNERS.items()
    if "-v2-" in env_id
}
ONE_EACH = [
    *("Ant-v2-4x2", "HalfCheetah-v2-2x3", "Hopper-v2-3x1", "Walker2d-v2-2x3", "Humanoid-v2-9|8"),
    *("HumanoidStandup-v2-17x1", "Reacher-v2-2x1", "Swimmer-v2-2x1"),
    *("coupled_half_cheetah-1p1", "manyagent_swimmer-3x2", "manyagent_ant-2x1"),
    *("Ant-v5-4x2", "Humanoid-v5-9|8", "Reacher-v5-2x1", "Pusher-v5-3p"),
]


def joints_of(env_id):
    return [joints.split() for joints in OWNERS[env_id][1]]


def actuator_of(model, joint):
    (actuator,) = np.flatnonzero(model.actuator_trnid[:, 0] == model.joint(joint).id)
    return actuator


def random_actions(envs, steps, seed=0):
    """(steps, E, N, act) float64, uniform within the bounds."""
    low, high = envs.action_space.low.astype(float), envs.action_space.high.astype(float)
    return np.random.default_rng(seed).uniform(low, high, (steps, *low.shape))


def rollout(envs, actions):
    """All that stepping with actions (T, E, N, act) returns, as a dict of arrays (T, E, ...)."""
    rows = []
    for action in actions:
        obs, reward, terminated, truncated, infos = envs.step(action)
        row = {"obs": obs, "reward": reward, "terminated": terminated, "truncated": truncated}
        row.update({name: infos[name] for name in ("state", "final_obs", "final_state", "_final_obs")})
        for name in ("r", "l"):  # valid where an episode has ended
            value = infos["episode"][name] if "episode" in infos else 0
            row[name] = np.where(infos["_final_obs"], value, 0)
        rows.append(row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def assert_same(a, b, environments=slice(None)):
    """Two rollouts are the same bit for bit, in some environments or in all."""
    assert a.keys() == b.keys()
    for name in a:
        ours, theirs = a[name][:, environments], b[name][:, environments]
        differing = np.argwhere(ours != theirs)
        assert np.array_equal(ours, theirs), f"{name} differs first at (step, environment, ...) {differing[:1]}"


# ---- Gymnasium's v4 and v5 tasks ----
def state_of(task, version, observation):
    """Our state from Gymnasium's observation: for v2 with contact forces, six for each of 14 bodies, at zero."""
    if version == "v5":
        return observation
    if task == "Ant":  # v4 leaves them out
        return np.concatenate([observation, np.zeros(84)])
    if task.startswith("Humanoid"):  # v4 computes them
        observation[-84:] = 0
    return observation


def oracle_with(task, version, rng):
    oracle = gymnasium.make(f"{task}-{'v4' if version == 'v2' else version}").unwrapped
    oracle.np_random = rng  # reset() without a seed leaves it in place
    return oracle


@pytest.mark.parametrize(
    ("env_id", "episode_limit", "terminations"),
    [
        ("Ant-v2-2x4d", 300, 3),
        ("HalfCheetah-v2-3x2", 100, 0),
        ("Hopper-v2-3x1", 1000, 3),
        ("Walker2d-v2-3x2", 1000, 3),
        ("Humanoid-v2-9|8", 1000, 3),
        ("HumanoidStandup-v2-17x1", 100, 0),
        ("Reacher-v2-2x1", 50, 0),
        ("Swimmer-v2-2x1", 100, 0),
        ("Ant-v5-4x2", 300, 3),
        ("HalfCheetah-v5-2x3", 100, 0),
        ("Hopper-v5-3x1", 1000, 3),
        ("Walker2d-v5-2x3", 1000, 3),
        ("Humanoid-v5-17x1", 1000, 3),
        ("HumanoidStandup-v5-9|8", 100, 0),
        ("Reacher-v5-2x1", 50, 0),
        ("Pusher-v5-3p", 100, 0),
        ("Swimmer-v5-2x1", 100, 0),
    ],
)
def test_agrees_with_gymnasium(env_id, episode_limit, terminations):
    (task, version, _), seed, num_envs, steps = env_id.split("-"), 7, 3, 1000
    envs = MaMuJoCoVecEnv(env_id, num_envs, seed=0, episode_limit=episode_limit)
    oracles = [oracle_with(task, version, np.random.default_rng([seed, i])) for i in range(num_envs)]
    _, infos = envs.reset(seed=seed)
    for i, oracle in enumerate(oracles):
        assert np.array_equal(infos["state"][i], state_of(task, version, oracle.reset()[0]))
    places = [(a, k, joint) for a, joints in enumerate(joints_of(env_id)) for k, joint in enumerate(joints)]
    ended, lengths = [], np.zeros(num_envs, int)
    for actions in random_actions(envs, steps, seed=1):
        _, reward, terminated, truncated, infos = envs.step(actions)
        lengths += 1
        for i, oracle in enumerate(oracles):
            joint_action = np.full(oracle.model.nu, np.nan)
            for agent, k, joint in places:
                joint_action[actuator_of(oracle.model, joint)] = actions[i, agent, k]
            observation, expected, oracle_terminated, _, info = oracle.step(joint_action)
            if version == "v2":
                expected -= info.get("reward_impact", 0.0)  # HumanoidStandup's contact cost
            assert np.array_equal(infos["final_state"][i], state_of(task, version, observation))
            assert abs(reward[i] - expected) < 1e-9
            assert terminated[i] == oracle_terminated
            assert truncated[i] == (lengths[i] == episode_limit)
            state = infos["final_state"][i]
            if oracle_terminated or truncated[i]:
                ended.append(oracle_terminated)
                state, lengths[i] = state_of(task, version, oracle.reset()[0]), 0
            assert np.array_equal(infos["state"][i], state)
    assert len(ended) >= 3 and sum(ended) >= terminations


@pytest.mark.parametrize(
    ("env_id", "field", "index", "value", "expected"),
    [  # what random actions hardly reach
        ("Ant-v2-4x2", "qvel", 2, -20.0, True),
        ("Ant-v2-4x2", "qpos", 2, 0.3, False),
        ("Hopper-v2-3x1", "qpos", 1, 3.0, False),
        ("Hopper-v2-3x1", "qvel", 0, 99.0, False),  # shows as 10 in the state
        ("Hopper-v2-3x1", "qvel", 0, -101.0, True),
        ("Walker2d-v2-2x3", "qpos", 1, 1.95, False),
        ("Walker2d-v2-2x3", "qpos", 1, 2.05, True),
        ("Walker2d-v2-2x3", "qvel", 0, -200.0, False),
        ("Humanoid-v2-9|8", "qpos", 2, 1.95, False),
        ("Humanoid-v2-9|8", "qpos", 2, 2.05, True),
        ("HumanoidStandup-v2-9|8", "qpos", 2, 3.0, False),
        ("Ant-v5-4x2", "qvel", 2, -20.0, True),
        ("Ant-v5-4x2", "qpos", 2, 0.3, False),
        ("Hopper-v5-3x1", "qvel", 0, -101.0, True),
        ("Walker2d-v5-2x3", "qpos", 1, 2.05, True),
        ("Humanoid-v5-9|8", "qpos", 2, 2.05, True),
        ("Humanoid-v5-9|8", "qvel", 2, -50.0, True),
        ("HumanoidStandup-v5-9|8", "qvel", 2, -100.0, False),
    ],
)
def test_agrees_with_gymnasium_on_extreme_states(env_id, field, index, value, expected):
    (task, version, _), envs = env_id.split("-"), MaMuJoCoVecEnv(env_id, 1)
    oracle = oracle_with(task, version, np.random.default_rng([3, 0]))
    oracle.reset()
    envs.reset(seed=3)
    getattr(envs.batch, field)[0, index] = value
    envs.batch.forward()
    getattr(oracle.data, field)[index] = value
    mujoco.mj_forward(oracle.model, oracle.data)
    _, reward, terminated, _, infos = envs.step(np.zeros(envs.action_space.shape))
    observation, oracle_reward, oracle_terminated, _, info = oracle.step(np.zeros(oracle.model.nu))
    assert terminated[0] == oracle_terminated == expected
    impact = info.get("reward_impact", 0.0) if version == "v2" else 0.0
    assert reward[0] == pytest.approx(oracle_reward - impact, abs=1e-9)
    assert np.array_equal(infos["final_state"][0], state_of(task, version, observation))


# ---- Who controls which joints ----
@pytest.mark.parametrize("env_id", OWNERS)
def test_actions_reach_their_joints(env_id):
    agents, state_size, num_envs = joints_of(env_id), OWNERS[env_id][0], 2
    envs = MaMuJoCoVecEnv(env_id, num_envs)
    model, num_agents, width = envs.batch.model, len(agents), max(map(len, agents))
    assert envs.num_agents == num_agents and envs.state_size == state_size
    assert envs.single_action_space.shape == (num_agents, width)
    assert envs.single_observation_space.shape == (num_agents, state_size + num_agents)
    assert envs.action_space.shape == (num_envs, num_agents, width)
    obs, infos = envs.reset()
    assert obs.shape == envs.observation_space.shape == (num_envs, num_agents, state_size + num_agents)
    assert infos["state"].shape == envs.state.shape == (num_envs, state_size)

    actions = np.linspace(0.01, 0.02, num_envs * num_agents * width).reshape(num_envs, num_agents, width)
    obs, *_, infos = envs.step(actions)
    assert not infos["_final_obs"].any()  # a reset would have cleared the controls
    assert obs.shape == envs.observation_space.shape and infos["final_state"].shape == (num_envs, state_size)
    ctrl, reached = envs.batch.ctrl, set()
    for agent, joints in enumerate(agents):
        for k in range(width):
            low, high = envs.single_action_space.low[agent, k], envs.single_action_space.high[agent, k]
            if k < len(joints):
                actuator = actuator_of(model, joints[k])
                reached.add(actuator)
                assert np.array_equal(ctrl[:, actuator], actions[:, agent, k])
                assert np.array_equal([low, high], model.actuator_ctrlrange[actuator].astype(np.float32))
            else:
                assert low == high == 0
                assert not np.isin(actions[:, agent, k], ctrl).any()
    assert reached == set(range(model.nu))


def test_only_unequal_parts_are_padded():
    low = MaMuJoCoVecEnv("Humanoid-v2-9|8", 1).single_action_space.low
    assert np.argwhere(low == 0).tolist() == [[1, 8]]
    padded = [env_id for env_id in OWNERS if len({len(joints) for joints in joints_of(env_id)}) > 1]
    expected = ["Humanoid-v2-9|8", "HumanoidStandup-v2-9|8", "Pusher-v5-3p"]
    assert padded == [*expected, "Humanoid-v5-9|8", "HumanoidStandup-v5-9|8"]


# ---- Models built in code ----
def capsule_mass(length, radius, density):
    return density * (math.pi * radius**2 * length + 4 / 3 * math.pi * radius**3)


def at_rest(model):
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return data


def assert_motors(model, joints):
    """A motor of gear 150 and control +-1 on each of the joints, and nothing else."""
    assert sorted(actuator_of(model, joint) for joint in joints) == list(range(model.nu))
    assert (model.actuator_gear == [150, 0, 0, 0, 0, 0]).all()
    assert (model.actuator_ctrlrange == [-1, 1]).all() and model.actuator_ctrllimited.all()
    assert (model.actuator_gaintype == mujoco.mjtGain.mjGAIN_FIXED).all() and not model.actuator_biasprm.any()
    assert (model.actuator_gainprm[:, 0] == 1).all()


def assert_integration(envs, timestep, frame_skip):
    assert envs.batch.model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    assert envs.batch.model.opt.timestep == timestep
    envs.step(np.zeros(envs.action_space.shape))
    assert envs.batch.time == pytest.approx(timestep * frame_skip)


def contact_bodies(envs, steps):
    """Pairs of bodies that touch while environment 0 acts at random."""
    pairs = set()
    for actions in random_actions(envs, steps):
        envs.step(actions)
        data = envs.batch.get_data(0)
        mujoco.mj_forward(envs.batch.model, data)
        pairs |= {tuple(envs.batch.model.geom_bodyid[pair].tolist()) for pair in data.contact.geom}
    return pairs


@pytest.mark.parametrize(
    ("size", "up"), [("1x1", [1]), ("2x1", [1, 1]), ("3x2", [1, 1, -1, 1, -1, 1]), ("5x1", [1, 1, -1, 1, 1])]
)
def test_manyagent_swimmer_is_as_specified(size, up):
    envs, n = MaMuJoCoVecEnv(f"manyagent_swimmer-{size}", 2), len(up)
    model = envs.batch.model
    data = at_rest(model)
    assert (model.opt.density, model.opt.viscosity) == (4000, 0.1)
    assert [model.joint(i).name for i in range(3)] == ["slider1", "slider2", "rot"]
    kinds = [mujoco.mjtJoint.mjJNT_SLIDE] * 2 + [mujoco.mjtJoint.mjJNT_HINGE] * (1 + n)
    assert model.jnt_type.tolist() == [int(kind) for kind in kinds]
    assert model.jnt_axis.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]] + [[0, 0, z] for z in up]
    assert model.jnt_limited.tolist() == [0] * 3 + [1] * n
    assert np.allclose(np.degrees(model.jnt_range[3:]), [-100, 100])
    assert (model.dof_armature[3:] == 0.1).all()
    assert not model.jnt_pos.any() and not model.qpos0.any()
    assert (model.nq, model.nv, model.nu, model.nbody) == (3 + n, 3 + n, n, 2 + n)
    assert np.allclose(model.body_mass[1:], capsule_mass(1.0, 0.1, 1000))
    assert np.allclose(data.xpos[2:, 0], [0.5 - i for i in range(n)]) and not data.xpos[1:, 1:].any()
    centres = data.geom_xpos[model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE]
    assert np.allclose(centres, [[1.0 - i, 0, 0] for i in range(1 + n)])
    assert_motors(model, [f"rot{i}" for i in range(n)])
    assert not contact_bodies(envs, 30)
    envs.reset()
    assert_integration(envs, timestep=0.005, frame_skip=4)


def test_manyagent_swimmer_rewards_speed_and_resets_with_uniform_noise():
    envs = MaMuJoCoVecEnv("manyagent_swimmer-2x2", 50, episode_limit=10)
    _, infos = envs.reset()
    for part in (infos["state"], envs.batch.qpos[:, :2]):
        assert np.abs(part).max() <= 0.1
        assert part.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.15)
    for actions in random_actions(envs, 9):
        before = envs.batch.qpos.copy()
        _, reward, terminated, _, infos = envs.step(actions)
        after = envs.batch.qpos
        for i in range(50):
            assert reward[i] == pytest.approx((after[i, 0] - before[i, 0]) / 0.02 - 1e-4 * (actions[i] ** 2).sum())
            expected = np.concatenate([after[i, 2:], envs.batch.qvel[i]])
            assert np.array_equal(infos["state"][i], expected)
        assert not terminated.any()


@pytest.mark.parametrize("size", ["1x1", "2x1", "2x2"])
def test_manyagent_ant_is_as_specified(size):
    envs = MaMuJoCoVecEnv(f"manyagent_ant-{size}", 2)
    agents, each = map(int, size.split("x"))
    model, n = envs.batch.model, agents * each
    data = at_rest(model)
    names = [f"{part}{leg}_{i}" for i in range(n) for leg in (1, 2) for part in ("hip", "ankle")]
    assert [model.joint(j).name for j in range(model.njnt)] == ["root", *names]
    assert model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE
    assert (model.nq, model.nv, model.nu) == (7 + 4 * n, 6 + 4 * n, 4 * n)
    assert envs.state_size == (model.nq - 2) + model.nv + 6 * model.nbody
    assert_motors(model, names)
    assert (model.dof_armature[6:] == 1).all() and (model.dof_damping[6:] == 1).all()
    assert not model.dof_armature[:6].any() and not model.dof_damping[:6].any()
    assert (model.geom_friction[:, 0] == 1).all() and (model.geom_friction[:, 1:] == 0.5).all()
    assert (model.geom_margin == 0.01).all()

    # a capsule is known by its two ends; legs go out from a segment in three capsules
    def ends(geom):
        half = model.geom_size[geom, 1] * data.geom_xmat[geom].reshape(3, 3)[:, 2]
        return tuple(sorted(tuple(np.round(data.geom_xpos[geom] + sign * half, 6) + 0.0) for sign in (-1, 1)))

    capsules = {ends(geom): geom for geom in range(model.ngeom) if model.geom_type[geom] != 0}
    mass, expected_capsules = 0.0, 0
    for i in range(n):
        origin = np.array([-i, 0, 0.75])
        if i > 0:
            spine = tuple(sorted([tuple(origin), tuple(origin + [1, 0, 0])]))
            assert model.geom_size[capsules[spine], 0] == 0.1
            mass, expected_capsules = mass + capsule_mass(1.0, 0.1, 100), expected_capsules + 1
        for leg, side in ((1, 1), (2, -1)):
            if i == 0:
                steps = [(0.2, 0.2 * side, 0), (0.2, 0.2 * side, 0), (0.4, 0.4 * side, 0)]
                ankle_range, ankle_axis = [30, 70], [-side, 1, 0]
            else:
                steps = [(0, 0.2 * side, 0), (-0.2, 0.2 * side, 0), (-0.4, 0.4 * side, 0)]
                ankle_range, ankle_axis = [-70, -30], [side, 1, 0]
            corners = origin + np.cumsum([(0, 0, 0), *steps], axis=0)
            for start, end in zip(corners[:-1], corners[1:], strict=True):
                key = tuple(sorted(tuple(np.round(corner, 6) + 0.0) for corner in (start, end)))
                assert model.geom_size[capsules[key], 0] == 0.08
                mass, expected_capsules = mass + capsule_mass(math.dist(start, end), 0.08, 5), expected_capsules + 1
            hip, ankle = model.joint(f"hip{leg}_{i}"), model.joint(f"ankle{leg}_{i}")
            assert np.allclose(data.xanchor[hip.id], corners[1]) and np.allclose(data.xanchor[ankle.id], corners[2])
            assert np.allclose(data.xaxis[hip.id], [0, 0, 1])
            assert np.allclose(data.xaxis[ankle.id], np.array(ankle_axis) / math.sqrt(2))
            assert np.allclose(np.degrees(hip.range), [-30, 30]) and np.allclose(np.degrees(ankle.range), ankle_range)
            assert model.jnt_limited[[hip.id, ankle.id]].all()
    assert len(capsules) == expected_capsules == model.ngeom - 1
    assert model.body_mass.sum() == pytest.approx(mass)

    collide = (model.geom_contype[:, None] & model.geom_conaffinity) != 0
    collide |= collide.T
    assert collide[0, 1:].all() and not collide[1:, 1:].any()  # geom 0 is the floor
    pairs = contact_bodies(envs, 40)
    assert pairs and all(0 in pair for pair in pairs)  # body 0 is the world
    envs.reset()
    assert_integration(envs, timestep=0.005, frame_skip=4)


def test_manyagent_ant_rewards_and_terminates():
    envs = MaMuJoCoVecEnv("manyagent_ant-2x1", 4)
    torso = envs.batch.model.body("torso_0").id
    xpos = envs.batch.bind("xpos")
    envs.reset()
    for actions in random_actions(envs, 20):
        before = xpos[:, torso, 0].copy()
        _, reward, _, _, infos = envs.step(actions)
        for i in np.flatnonzero(~infos["_final_obs"]):
            velocity = (xpos[i, torso, 0] - before[i]) / 0.02
            assert reward[i] == pytest.approx(velocity - 0.5 * (actions[i] ** 2).sum() + 1)
            expected = np.concatenate([envs.batch.qpos[i, 2:], envs.batch.qvel[i], np.zeros(6 * 15)])
            assert np.array_equal(infos["state"][i], expected)
    envs.reset()
    envs.batch.qvel[:] = 0
    envs.batch.qpos[:, 2] = [1.05, 0.75, 0.95, 0.1]
    _, _, terminated, _, infos = envs.step(np.zeros(envs.action_space.shape))
    height = infos["final_state"][:, 0]
    assert height[0] > 1.0 and height[3] < 0.2
    assert terminated.tolist() == [True, False, False, True]
    assert infos["unstable"] == 0  # these are the task's own terminations


def test_manyagent_ant_reset_noise():
    envs = MaMuJoCoVecEnv("manyagent_ant-2x2", 100)
    envs.reset()
    offset = envs.batch.qpos - envs.batch.model.qpos0
    assert np.abs(offset).max() <= 0.1
    assert offset.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.1)
    assert np.abs(envs.batch.qvel).max() > 0.2  # normal, not uniform
    assert envs.batch.qvel.std() == pytest.approx(0.1, rel=0.1)


def test_coupled_half_cheetah_is_as_specified():
    envs, half = MaMuJoCoVecEnv("coupled_half_cheetah-1p1", 20), MaMuJoCoVecEnv("HalfCheetah-v2-2x3", 1).batch.model
    model = envs.batch.model
    data = at_rest(model)
    assert (model.nq, model.nv, model.nu, model.ntendon, model.neq) == (18, 18, 12, 1, 0)
    assert model.body_mass.sum() == pytest.approx(14)
    assert np.allclose(model.body_mass[1:], np.tile(half.body_mass[1:], 2) / 2)
    torsos = [model.body("torso").id, model.body("second_torso").id]
    assert np.allclose(data.xpos[torsos], [[0, -1, 0.7], [0, 1, 0.7]])
    for name in ("jnt_type", "jnt_axis", "jnt_range", "jnt_stiffness", "dof_damping", "dof_armature"):
        assert np.array_equal(getattr(model, name), np.concatenate([getattr(half, name)] * 2)), name
    assert np.array_equal(model.actuator_gear, np.concatenate([half.actuator_gear] * 2))
    assert model.tendon_limited.all() and model.tendon_range.tolist() == [[1.5, 3.5]]
    assert model.tendon_stiffness.reshape(-1)[0] == 0.1
    assert data.ten_length == pytest.approx([2.0])
    assert model.opt.timestep == half.opt.timestep == 0.01 and model.opt.integrator == half.opt.integrator

    envs.reset()
    assert np.abs(envs.batch.qpos).max() <= 0.1 < np.abs(envs.batch.qvel).max()
    for actions in random_actions(envs, 20):
        before = envs.batch.qpos.copy()
        _, reward, terminated, _, infos = envs.step(actions)
        after = envs.batch.qpos
        for i in range(20):
            one, two = (
                (after[i, x] - before[i, x]) / 0.05 - 0.1 * (actions[i, agent] ** 2).sum()
                for agent, x in enumerate((0, 9))
            )
            assert reward[i] == pytest.approx((one + two) / 2)
            assert np.array_equal(infos["state"][i], np.concatenate([after[i, 1:], envs.batch.qvel[i]]))
        assert not terminated.any()
    assert envs.batch.time == pytest.approx(20 * 0.05)


def test_the_tendon_pulls_the_cheetahs_together():
    """Torsos that are 5 apart feel that the tendon's length is limited to 3.5."""
    model = MaMuJoCoVecEnv("coupled_half_cheetah-1p1", 1).batch.model
    data = mujoco.MjData(model)
    data.joint("second_rootx").qpos = math.sqrt(5**2 - 2**2)
    mujoco.mj_forward(model, data)
    assert data.ten_length == pytest.approx([5.0])
    assert data.joint("second_rootx").qacc < -1 and data.joint("rootx").qacc > 1


# ---- Observations ----
def standardised(vector):
    """By hand, in float64, with the population's standard deviation."""
    mean = sum(vector) / len(vector)
    std = math.sqrt(sum((x - mean) ** 2 for x in vector) / len(vector))
    return [(x - mean) / std for x in vector]


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_observations_are_the_standardised_state_and_id(library, leading):
    state = np.random.default_rng(0).normal(3, 20, (*leading, 11))
    obs, view = agent_observations(library(state), 4), critic_state(library(state))
    assert obs.shape == (*leading, 4, 15) and obs.dtype == library(state).dtype
    assert view.shape == state.shape
    for index in np.ndindex(leading):
        assert np.allclose(view[index], standardised(state[index]), rtol=0, atol=1e-12)
        for agent in range(4):
            one_hot = [float(agent == other) for other in range(4)]
            expected = standardised([*state[index], *one_hot])
            assert np.allclose(obs[(*index, agent)], expected, rtol=0, atol=1e-12)


def test_observations_take_a_dtype():
    state = np.random.default_rng(0).normal(size=(3, 7))
    exact = agent_observations(state, 2)
    assert exact.dtype == np.float64
    for obs in (agent_observations(state, 2, np.float32), agent_observations(torch.tensor(state), 2, torch.float32)):
        assert obs.dtype in (np.float32, torch.float32)
        assert np.array_equal(obs, exact.astype(np.float32))  # computed in float64 and rounded once
    assert agent_observations(torch.tensor(state, dtype=torch.float32), 2).dtype == torch.float32


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_a_constant_state_becomes_zeros(library):
    for value in (0.0, 0.5, -3.0):
        constant = library(np.full((2, 8), value))
        assert np.array_equal(critic_state(constant), np.zeros((2, 8)))
        assert np.isfinite(np.asarray(agent_observations(constant, 3))).all()


@pytest.mark.parametrize("env_id", ONE_EACH)
def test_observations_are_a_function_of_the_state(env_id):
    envs = MaMuJoCoVecEnv(env_id, 2, episode_limit=7)
    obs, infos = envs.reset()
    assert np.array_equal(obs, agent_observations(infos["state"], envs.num_agents, np.float32))
    assert np.array_equal(infos["state"], envs.state)
    run = rollout(envs, random_actions(envs, 20))
    assert run["_final_obs"].any()
    for obs, state in (("obs", "state"), ("final_obs", "final_state")):
        assert np.array_equal(run[obs], agent_observations(run[state], envs.num_agents, np.float32))


# ---- Partial observations ----
def seen_by_agents(envs, state):
    """What each agent sees of a state (S,), without padding."""
    return [state[own[own >= 0]] for own in envs.columns]


@pytest.mark.parametrize("distance", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "env_id",
    [
        *("Ant-v5-4x2", "Ant-v5-2x4", "HalfCheetah-v5-2x3", "HalfCheetah-v5-6x1", "Hopper-v5-3x1", "Walker2d-v5-2x3"),
        *("Humanoid-v5-9|8", "HumanoidStandup-v5-9|8", "Reacher-v5-2x1", "Pusher-v5-3p", "Swimmer-v5-2x1"),
    ],
)
def test_agrees_with_mamujoco_v1(env_id, distance):
    task, _, partition = env_id.split("-")
    envs = MaMuJoCoVecEnv(env_id, 1, agent_obsk=distance)
    envs.reset(seed=1)
    oracle = mamujoco_v1.parallel_env(task, partition, agent_obsk=distance)
    oracle.reset(seed=0)
    single = oracle.single_agent_env.unwrapped
    single.set_state(envs.task.qpos[0].copy(), envs.task.qvel[0].copy())
    joint_of = [single.model.joint(joint).name for joint in single.model.actuator_trnid[:, 0]]
    owners = [{joint_of[node.act_ids] for node in nodes} for nodes in oracle.agent_action_partitions]
    theirs = [owners.index(set(joints)) for joints in parse_env_id(env_id)[2]]  # they number agents in another order
    forces = 0.0
    for actions in random_actions(envs, 20):
        *_, infos = envs.step(actions)
        oracle.step(oracle.map_global_action_to_local_actions(envs.batch.ctrl[0].copy()))
        for agent, seen in enumerate(seen_by_agents(envs, infos["final_state"][0])):
            expected = oracle._get_obs_agent(theirs[agent])
            if task == "Walker2d":  # they do not clip velocities as the task does
                expected = np.clip(expected, -10, 10)
            if task == "Reacher":  # the third part of a distance in the plane is not in the state
                expected = expected[~((expected == 0) & (np.arange(len(expected)) == 5))] if agent == 1 else expected
            if task in ("Humanoid", "HumanoidStandup", "Pusher"):  # they name some joints by others' names
                seen, expected = np.sort(seen), np.sort(expected)
            assert np.array_equal(seen, expected)
        if envs.task.measured:
            forces = max(forces, np.abs(envs.task.forces).max())
        if infos["_final_obs"].any():
            break
    assert forces > 0 or not envs.task.measured


@pytest.mark.parametrize(
    ("env_id", "distance", "sizes"),
    [  # worked out by hand: joints' own positions and velocities, positions further out, what the root has
        ("HalfCheetah-v2-3x2", 0, [4 + 5, 4 + 5, 4 + 5]),
        ("HalfCheetah-v2-3x2", 1, [4 + 1 + 5, 4 + 4 + 5 - 1, 4 + 2 + 5]),
        ("Walker2d-v2-6x1", 1, [2 + 1 + 5, 2 + 2 + 5, 2 + 2 + 5, 2 + 1 + 5, 2 + 2 + 5, 2 + 2 + 5]),
        ("Ant-v2-8x1", 1, [2 + 12 + 4 + 11, 2 + 18 + 1 + 11] * 4),
        ("manyagent_swimmer-3x2", 1, [4 + 1, 4 + 2, 4 + 1]),
        ("manyagent_ant-2x1", 0, [8 + 42 + 11, 8 + 42 + 11]),
        ("manyagent_ant-2x1", 1, [8 + 42 + 2 + 11, 8 + 42 + 2 + 11]),
        ("coupled_half_cheetah-1p1", 5, [12 + 11, 12 + 11]),
    ],
)
def test_agents_see_what_is_near(env_id, distance, sizes):
    envs = MaMuJoCoVecEnv(env_id, 2, agent_obsk=distance)
    assert [(own >= 0).sum() for own in envs.columns] == sizes
    assert all(len(set(own[own >= 0])) == (own >= 0).sum() for own in envs.columns), "nothing twice"
    obs, infos = envs.reset()
    assert obs.shape == envs.observation_space.shape == (2, envs.num_agents, max(sizes) + envs.num_agents)
    run = rollout(envs, random_actions(envs, 3))
    for name, state in (("obs", "state"), ("final_obs", "final_state")):
        expected = agent_observations(run[state], envs.num_agents, np.float32, envs.columns)
        assert np.array_equal(run[name], expected)


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_partial_observations_are_standardised_and_filled_up(library):
    state = np.random.default_rng(0).normal(3.0, 5.0, (2, 4, 6))
    columns = np.array([[0, 5, 2], [4, -1, -1]])
    obs = np.asarray(agent_observations(library(state), 2, columns=library(columns)))
    for place in np.ndindex(2, 4):
        own = state[place]
        assert np.allclose(obs[place][0], standardised([own[0], own[5], own[2], 1, 0]), rtol=0, atol=1e-12)
        vector = standardised([own[4], 0, 1])
        assert np.allclose(obs[place][1], [vector[0], 0, 0, vector[1], vector[2]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("env_id", ["Ant-v2-8x1", "manyagent_swimmer-3x2", "Reacher-v2-2x1"])
def test_a_distance_beyond_the_robot_ends_at_once(env_id):
    def too_long(*_):
        raise TimeoutError

    furthest, before = MaMuJoCoVecEnv(env_id, 1, agent_obsk=20), signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        assert np.array_equal(MaMuJoCoVecEnv(env_id, 1, agent_obsk=1_000_000_000).columns, furthest.columns)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- What step returns ----
def test_is_a_gymnasium_vector_environment():
    envs = MaMuJoCoVecEnv("Hopper-v2-3x1", 3)
    assert isinstance(envs, VectorEnv) and envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert envs.num_envs == 3
    obs, infos = envs.reset()
    assert obs in envs.observation_space and obs[0] in envs.single_observation_space
    assert obs.dtype == np.float32 and infos["state"].dtype == np.float64
    actions = envs.action_space.sample()
    assert actions.dtype == np.float32 and actions[0] in envs.single_action_space
    obs, reward, terminated, truncated, infos = envs.step(actions)
    assert obs.dtype == infos["final_obs"].dtype == np.float32
    assert reward.dtype == infos["state"].dtype == infos["final_state"].dtype == np.float64
    assert terminated.dtype == truncated.dtype == infos["_final_obs"].dtype == bool
    for array in (reward, terminated, truncated, infos["_final_obs"]):
        assert array.shape == (3,)
    assert infos["unstable"] == 0
    envs.close()


def test_same_step_autoreset():
    """Hoppers that fall at different times, or are cut off after 30 steps."""
    num_envs, limit = 5, 30
    envs = MaMuJoCoVecEnv("Hopper-v2-3x1", num_envs, seed=4, episode_limit=limit)
    _, infos = envs.reset()
    state, starts = infos["state"], [infos["state"]]
    returns, lengths = [[] for _ in range(num_envs)], []
    kinds = set()
    for actions in random_actions(envs, 200, seed=3):
        obs, reward, terminated, truncated, infos = envs.step(actions)
        done = terminated | truncated
        assert np.array_equal(infos["_final_obs"], done)
        assert ("episode" in infos) == ("_episode" in infos) == done.any()
        if done.any():
            assert np.array_equal(infos["_episode"], done)
        for i in range(num_envs):
            returns[i].append(reward[i])
            assert truncated[i] == (len(returns[i]) == limit)
            assert not np.array_equal(infos["final_state"][i], state[i])
            assert np.array_equal(infos["final_state"][i], infos["state"][i]) == (not done[i])
            assert np.array_equal(infos["final_obs"][i], obs[i]) == (not done[i])
            if done[i]:
                kinds.add((terminated[i], truncated[i]))
                assert infos["episode"]["r"][i] == pytest.approx(sum(returns[i]))
                assert infos["episode"]["l"][i] == len(returns[i])
                assert np.abs(infos["state"][i] - [1.25, *[0] * 10]).max() <= 5e-3  # a fresh start: upright
                lengths.append(len(returns[i]))
                returns[i] = []
        state = infos["state"]
        starts.append(state[done])
    assert {(True, False), (False, True)} <= kinds and len(set(lengths)) > 2
    assert len(np.unique(np.concatenate(starts), axis=0)) == num_envs + len(lengths)  # no start twice


def test_reset_begins_new_episodes():
    envs = MaMuJoCoVecEnv("HalfCheetah-v2-2x3", 2, episode_limit=10)
    rollout(envs, random_actions(envs, 6))
    envs.reset()
    run = rollout(envs, random_actions(envs, 10))
    assert not run["truncated"][:9].any() and run["truncated"][9].all()
    assert np.allclose(run["r"][9], run["reward"].sum(axis=0))


@pytest.mark.parametrize(
    ("env_id", "limit"),
    [("Reacher-v2-2x1", 50), ("Reacher-v5-2x1", 50), ("Pusher-v5-3p", 100), ("Swimmer-v2-2x1", 1000)],
)
def test_an_episode_is_as_long_as_gymnasiums(env_id, limit):
    task, version, _ = env_id.split("-")
    assert gymnasium.spec(f"{task}-{version.replace('v2', 'v4')}").max_episode_steps == limit
    envs = MaMuJoCoVecEnv(env_id, 1)
    actions = np.zeros((limit, *envs.action_space.shape))
    assert rollout(envs, actions)["truncated"][:, 0].nonzero()[0].tolist() == [limit - 1]
    assert envs.episode_limit == limit
    shorter = rollout(MaMuJoCoVecEnv(env_id, 1, episode_limit=7), actions[:7])
    assert shorter["truncated"][:, 0].nonzero()[0].tolist() == [6]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("trained", "length"), [(1000, 1000), (None, 50)])
def test_a_model_is_evaluated_with_its_own_limit(script, trained, length, tmp_path, capsys):
    """Models that were saved when all tasks had a limit of 1000 hold this number."""
    env_id, device = "Reacher-v2-2x1", torch.device("cpu")
    args = script.Args(env_id=env_id, hidden_size=8, eval_episodes=1, num_threads=1, episode_limit=trained)
    envs = script.make_env(args, 1, 1)
    actor = script.Actor(envs.single_observation_space.shape[-1], *envs.action_space.low, *envs.action_space.high, args)
    save_model(tmp_path, SimpleNamespace(actor=actor, critic=actor, args=args), 0)
    flags = dict(evaluate=str(tmp_path / "model.pt"), eval_episodes=1, num_threads=1, hidden_size=8)
    for asked in (None, length):
        args = script.Args(**flags, episode_limit=asked)
        evaluate_model(args, device, script.Actor, script.make_env, script.evaluate)
        assert f"length {length}," in capsys.readouterr().out
    with pytest.raises(SystemExit):
        args = script.Args(**flags, episode_limit=60)
        evaluate_model(args, device, script.Actor, script.make_env, script.evaluate)
    assert f"--episode-limit is 60, expected {length} beside --evaluate" in capsys.readouterr().err


def test_returned_arrays_are_not_written_to_again():
    envs = MaMuJoCoVecEnv("Hopper-v2-3x1", 4, episode_limit=8)
    obs, infos = envs.reset()
    kept = [[obs, infos]]
    copies = copy.deepcopy(kept)
    for actions in random_actions(envs, 60):
        kept.append(list(envs.step(actions)))
        copies.append(copy.deepcopy(kept[-1]))
    envs.reset()
    for array, as_it_was in zip(leaves(kept), leaves(copies), strict=True):
        assert np.array_equal(array, as_it_was)


def leaves(nested):
    """The arrays and numbers in nested lists and dicts, in order."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [leaf for part in nested for leaf in leaves(part)] if isinstance(nested, list) else [nested]


@pytest.mark.parametrize("env_id", ONE_EACH)
def test_a_reset_computes_all_that_the_task_reads(env_id):
    """Tasks that are not `derived` leave out MuJoCo's forward pass, so nothing that they read may come from it."""
    envs = MaMuJoCoVecEnv(env_id, 3, episode_limit=5)
    rollout(envs, random_actions(envs, 5))  # what an earlier episode left must not show
    read = [envs.task.state(), envs.task.position(), envs.task.unhealthy()]
    physics = envs.batch.state.copy()
    envs.batch.forward()
    assert all(map(np.array_equal, read, [envs.task.state(), envs.task.position(), envs.task.unhealthy()]))
    assert np.array_equal(physics, envs.batch.state)  # and the forward pass leaves no trace in the physics


# ---- Seeds ----
@pytest.mark.parametrize("env_id", ONE_EACH)
def test_a_trajectory_depends_on_its_seed_and_place_only(env_id):
    largest = MaMuJoCoVecEnv(env_id, 7, seed=5, num_threads=2, episode_limit=15)
    actions = random_actions(largest, 25)
    largest.reset(seed=5)
    expected = rollout(largest, actions)
    for num_envs, num_threads in ((1, 1), (2, 2), (3, 1), (7, 1)):
        envs = MaMuJoCoVecEnv(env_id, num_envs, num_threads=num_threads, episode_limit=15)
        envs.reset(seed=5)
        assert_same(rollout(envs, actions[:, :num_envs]), expected, environments=range(num_envs))


def test_seeds_and_environments_differ():
    first = MaMuJoCoVecEnv("Ant-v2-4x2", 4, seed=1)
    states = [first.reset()[1]["state"], first.reset()[1]["state"], first.reset(seed=2)[1]["state"]]
    assert len(np.unique(np.concatenate(states), axis=0)) == 12
    assert np.array_equal(first.reset(seed=2)[1]["state"], states[2])
    again = MaMuJoCoVecEnv("Ant-v2-4x2", 4, seed=1)
    assert np.array_equal(again.reset()[1]["state"], states[0])
    assert np.array_equal(again.reset(seed=1)[1]["state"], states[0])
    assert not np.array_equal(again.reset(seed=3)[1]["state"], states[2])


# ---- Saving and resuming ----
@pytest.mark.parametrize("env_id", ["Hopper-v2-3x1", "Humanoid-v2-17x1", "manyagent_swimmer-3x2", "Humanoid-v5-17x1"])
def test_resumes_where_it_was_saved(env_id):
    envs = MaMuJoCoVecEnv(env_id, 3, seed=8, episode_limit=33)
    actions = random_actions(envs, 100)
    envs.reset()
    rollout(envs, actions[:40])
    saved = envs.get_state()
    as_saved = copy.deepcopy(saved)
    expected = rollout(envs, actions[40:])
    assert expected["_final_obs"].any()
    other = MaMuJoCoVecEnv(env_id, 3, seed=9, num_threads=1, episode_limit=33)
    rollout(other, actions[:5])
    for resumed in (other, envs):
        resumed.set_state(saved)
        assert np.array_equal(resumed.state, as_saved["state"])
        assert_same(rollout(resumed, actions[40:]), expected)
    assert all(map(np.array_equal, leaves(saved), leaves(as_saved)))  # neither stepping nor resuming changed it


def test_a_state_of_another_environment_is_refused():
    envs, more = MaMuJoCoVecEnv("Hopper-v2-3x1", 2), MaMuJoCoVecEnv("Hopper-v2-3x1", 3)
    before = envs.get_state()
    for other in (more, MaMuJoCoVecEnv("Walker2d-v2-2x3", 2)):
        with pytest.raises(ValueError, match="expected 2 x Hopper-v2-3x1"):
            envs.set_state(other.get_state())
    assert all(map(np.array_equal, leaves(envs.get_state()), leaves(before)))


# ---- Threads ----
def test_the_pool_takes_the_cpus_that_the_process_may_use(monkeypatch):
    """Not the machine's: a job on a cluster is often bound to some of them."""
    monkeypatch.delattr(os, "process_cpu_count", raising=False)  # of Python 3.13
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8}, raising=False)
    assert usable_cpus() == 3
    assert [MaMuJoCoVecEnv("Hopper-v2-3x1", 8, num_threads=n).batch.nthread for n in (0, 1, 5)] == [3, 1, 5]
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS and Windows have none
    assert usable_cpus() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1
    monkeypatch.setattr(os, "process_cpu_count", lambda: 2, raising=False)
    assert usable_cpus() == 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
@pytest.mark.parametrize("env_id", ["Hopper-v2-3x1", "Ant-v5-4x2", "Reacher-v2-2x1"])
def test_close_ends_the_threads(env_id):
    def count():
        return len(os.listdir("/proc/self/task"))

    before = count()
    envs = MaMuJoCoVecEnv(env_id, 8, num_threads=4)
    saved = envs.get_state()
    obs, infos = envs.reset()
    kept = envs.step(np.zeros(envs.action_space.shape))
    assert count() == before + 3  # and the one that calls
    envs.close()
    envs.close()
    assert count() == before and envs.closed
    assert all(np.isfinite(array).all() for array in (obs, infos["state"], kept[0], saved["physics"]))
    actions = np.zeros(envs.action_space.shape)
    for call in (lambda: envs.step(actions), envs.reset, envs.get_state, lambda: envs.set_state(saved)):
        with pytest.raises(ClosedEnvironmentError, match=f"{env_id}: expected no more calls after close"):
            call()


# ---- Bad input ----
@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Ant", "unknown env id 'Ant', expected one such as Ant-v2-2x4, Ant-v2-4x2, Ant-v2-8x1;"),
        ("Ant-v2", "unknown env id 'Ant-v2', expected one such as Ant-v2-2x4, Ant-v2-4x2"),
        ("Ant-v4", "unknown env id 'Ant-v4', expected one such as Ant-v2-2x4, Ant-v2-4x2"),
        ("Ant-v4-4x2", "unknown env id 'Ant-v4-4x2', expected one such as Ant-v2-4x2, Ant-v5-4x2;"),
        ("ant-V2-4x2", "unknown env id 'ant-V2-4x2', expected one such as Ant-v2-4x2, Ant-v5-4x2;"),
        ("HalfCheetah-v2", "such as HalfCheetah-v2-2x3, HalfCheetah-v2-3x2, HalfCheetah-v2-6x1;"),
        ("Walker2d-v4", "such as Walker2d-v2-2x3, Walker2d-v2-3x2, Walker2d-v2-6x1;"),
        ("Pusher-v4", "unknown env id 'Pusher-v4', expected one such as Pusher-v5-3p;"),
        ("manyagent_swimmer", "unknown env id 'manyagent_swimmer', expected one such as manyagent_swimmer-10x2;"),
        ("manyagent_ant", "unknown env id 'manyagent_ant', expected one such as manyagent_ant-2x3;"),
        ("coupled_half_cheetah", "expected one such as coupled_half_cheetah-1p1;"),
        ("foo", "unknown env id 'foo'; `python mamujoco_env.py` prints all"),
        ("", "unknown env id ''; `python mamujoco_env.py` prints all"),
        ("Ant-v2-3x3", "unknown partition '3x3'.*2x4d"),
        ("Ant-v2-", "unknown partition ''"),
        ("Humanoid-v2-8|9", "unknown partition"),
        ("manyagent_swimmer-10", "unknown partition '10'.*such as 10x2"),
        ("manyagent_swimmer-0x2", "unknown partition '0x2'"),
        ("manyagent_ant-2x0", "unknown partition '2x0'"),
        ("manyagent_ant-2x3x4", "unknown partition '2x3x4'"),
        ("manyagent_ant-x2", "unknown partition 'x2'"),
    ],
)
def test_unknown_ids_are_refused(env_id, message):
    with pytest.raises(EnvError, match=message) as refusal:
        MaMuJoCoVecEnv(env_id, 1)
    said = str(refusal.value)
    assert len(said) < 200 and ("unknown partition" in said or said.endswith("`python mamujoco_env.py` prints all"))


def test_the_module_prints_all_env_ids():
    module = Path(kalei_matd3_mamujoco.__file__).with_name("mamujoco_env.py")
    done = subprocess.run([sys.executable, module], capture_output=True, text=True, check=True)
    *printed, hint = done.stdout.splitlines()
    assert printed == ENV_IDS and set(printed) >= {env_id for env_id in OWNERS if "manyagent" not in env_id}
    assert hint.startswith("manyagent_*") and "NxM" in hint
    for env_id in printed:
        MaMuJoCoVecEnv(env_id, 1, num_threads=1).close()


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_wrong_flags_become_one_line(script, monkeypatch, capsys):
    """Somebody else's environment may break in any way: its traceback must reach the user."""
    for wrong in (dict(env_id="Ant"), dict(env_id="Hopper-v2-3x1", episode_limit=0), dict(env_id="Ant-v2-3x3")):
        with pytest.raises(SystemExit) as stop:
            script.make_env(script.Args(**wrong), 1, 1)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1

    class Broken:
        def __init__(self, *_):
            np.zeros(3) + np.zeros(4)

    monkeypatch.setattr(script, "MaMuJoCoVecEnv", Broken)
    with pytest.raises(ValueError, match="broadcast"):
        script.make_env(script.Args(env_id="Hopper-v2-3x1"), 1, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_envs", 0), ("num_envs", -1), ("num_envs", 2.5), ("num_threads", -1)),
        *(("seed", -1), ("seed", None), ("episode_limit", 0), ("episode_limit", math.nan), ("agent_obsk", -1)),
        ("num_envs", 10**12),
    ],
)
def test_impossible_numbers_are_refused(name, value):
    with pytest.raises(EnvError, match=f"{name} is {value}, expected an integer"):
        MaMuJoCoVecEnv("Hopper-v2-3x1", **{"num_envs": 1, name: value})


def test_a_seed_for_each_environment_is_refused():
    """Gymnasium's own vector environments take a list; here one seed serves all."""
    envs = MaMuJoCoVecEnv("Hopper-v2-3x1", 2)
    before = envs.get_state()
    with pytest.raises(ValueError, match=r"seed is \[1, 2\]"):
        envs.reset(seed=[1, 2])
    assert all(map(np.array_equal, leaves(envs.get_state()), leaves(before)))


def altered(actions, place, value):
    actions = actions.copy()
    actions[place] = value
    return actions


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bad_actions_are_refused_and_nothing_is_stepped(dtype):
    envs = MaMuJoCoVecEnv("HalfCheetah-v2-3x2", 4)
    envs.reset()
    fine = random_actions(envs, 3)
    rollout(envs, fine)
    fine, before = fine[0].astype(dtype), envs.get_state()
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="agent 2 in environment 1 is .*(nan|inf)"):
            envs.step(altered(fine, (1, 2, 0), value))
    for wrong in (fine[0], fine[:, :2], fine[..., :1], fine.reshape(4, 6), fine[None]):
        with pytest.raises(ValueError, match="actions have shape"):
            envs.step(wrong)
    assert all(map(np.array_equal, leaves(envs.get_state()), leaves(before)))


def test_large_finite_actions_are_no_error():
    """MuJoCo clamps them; their squares, which need not be finite in their dtype, decide nothing."""
    envs = MaMuJoCoVecEnv("Swimmer-v2-2x1", 4)
    for value, dtype in ((1e6, np.float32), (200.0, np.float16)):
        _, reward, _, _, infos = envs.step(np.full(envs.action_space.shape, value, dtype))
        assert reward == pytest.approx(-2e-4 * value**2, abs=10) and infos["unstable"] == 0


def test_a_reward_too_large_for_a_buffer_ends_the_episode():
    envs = MaMuJoCoVecEnv("Swimmer-v2-2x1", 3)
    actions = np.zeros(envs.action_space.shape)
    actions[1] = 1e30
    with pytest.warns(UserWarning, match=r"\[1\]"):
        _, reward, terminated, _, infos = envs.step(actions)
    assert terminated.tolist() == [False, True, False] and reward[1] == 0 and infos["unstable"] == 1


# ---- Instability ----
def test_an_unstable_environment_ends_alone():
    disturbed, calm = (MaMuJoCoVecEnv("Walker2d-v2-2x3", 3, seed=2) for _ in range(2))
    actions = random_actions(calm, 30)
    expected = rollout(calm, actions)
    last_good, rows, count = disturbed.state.copy(), [], 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k, action in enumerate(actions):
            if k in (3, 11, 12):
                field = "qvel" if k == 3 else "qpos"
                disturbed.batch.bind(field)[1] = 1e12 if k == 3 else np.nan
                count += 1
            run = rollout(disturbed, [action])
            rows.append(run)
            if k in (3, 11, 12):
                assert run["terminated"][0, 1] and run["reward"][0, 1] == 0
                assert np.array_equal(run["final_state"][0, 1], last_good[1])
                assert run["l"][0, 1] == {3: 4, 11: 8, 12: 1}[k]
            assert disturbed.get_state()["unstable"] == count
            assert all(np.isfinite(value).all() for value in run.values())
            last_good = run["state"][0]
    ours = [str(warning.message) for warning in caught if warning.filename == __file__]
    assert len(caught) == len(ours) == 1  # one for all three
    assert "Walker2d-v2-2x3" in ours[0] and "[1]" in ours[0]
    run = {name: np.concatenate([row[name] for row in rows]) for name in expected}
    assert_same(run, expected, environments=[0, 2])


@pytest.mark.parametrize("value", [np.nan, 1e11])
@pytest.mark.parametrize("env_id", ["HalfCheetah-v2-2x3", "Hopper-v2-3x1", "Ant-v2-4x2", "Humanoid-v2-17x1"])
def test_a_broken_state_ends_without_mujocos_warning(env_id, value, monkeypatch):
    """What the last simulation step of an environment step leaves, MuJoCo would judge at the next one only."""
    envs = MaMuJoCoVecEnv(env_id, 3)
    last_good, step = envs.state.copy(), envs.batch.step

    def step_then_break(**arguments):
        step(**arguments)
        envs.batch.qpos[2, -1] = value

    actions = random_actions(envs, 2)
    monkeypatch.setattr(envs.batch, "step", step_then_break)
    with pytest.warns(UserWarning, match=r"unstable simulation in environments \[2\]"):
        run = rollout(envs, actions[:1])
    assert run["terminated"][0].tolist() == [False, False, True]
    assert run["reward"][0, 2] == 0 and np.array_equal(run["final_state"][0, 2], last_good[2])
    monkeypatch.setattr(envs.batch, "step", step)
    *_, infos = envs.step(actions[1])
    assert infos["unstable"] == 1 and np.isfinite(infos["state"]).all() and not infos["_final_obs"].any()
    resumed = MaMuJoCoVecEnv(env_id, 3)
    resumed.set_state(envs.get_state())
    *_, infos = resumed.step(actions[1])
    assert infos["unstable"] == 1  # the count goes on, too


def test_an_error_of_mujoco_ends_the_episode():
    """An integrator that does not exist makes MuJoCo raise in one environment, which keeps its old state."""
    envs, calm = (MaMuJoCoVecEnv("Ant-v2-4x2", 3, seed=6) for _ in range(2))
    actions = random_actions(envs, 12)
    integrator = envs.batch.expand("opt.integrator")
    valid = integrator[1].copy()
    integrator[1] = 99
    with pytest.raises(SimulationError):  # so that what follows shows what it says
        envs.batch.step()
    envs.reset(seed=6)
    calm.reset(seed=6)
    last_good, expected = envs.state.copy(), rollout(calm, actions)
    with pytest.warns(UserWarning, match=r"\[1\]"):
        broken = rollout(envs, actions[:1])
    assert broken["terminated"][0].tolist() == [False, True, False] and broken["reward"][0, 1] == 0
    assert np.array_equal(broken["final_state"][0, 1], last_good[1])
    assert broken["l"][0, 1] == 1 and broken["r"][0, 1] == 0
    integrator[1] = valid
    rest = rollout(envs, actions[1:])
    assert np.isfinite(rest["reward"]).all() and envs.get_state()["unstable"] == 1
    run = {name: np.concatenate([broken[name], rest[name]]) for name in rest}
    assert_same(run, expected, environments=[0, 2])
