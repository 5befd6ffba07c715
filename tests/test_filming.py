"""Films of evaluation episodes, and the errors without OpenGL, a screen, or Weights & Biases."""

import importlib.util
import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from run_scripts import one_line, run_main, run_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kalei_mappo_mamujoco as script
from experiment import films
from experiment.agent_colours import agent_colour
from mamujoco_env import MaMuJoCoVecEnv, parse_env_id

TINY = "--device cpu --env-id Hopper-v2-3x1 --total-timesteps 80 --num-envs 4 --rollout-steps 10 --hidden-size 8"
TINY += " --eval-episodes 2 --eval-interval 40 --episode-limit 30 --num-threads 1 --save-model"


@pytest.fixture
def without_screen(monkeypatch):
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def opengl():
    """Skip the test if there is no EGL. If there is, films have to work."""
    try:
        from mujoco.egl import GLContext

        GLContext(8, 8).free()
    except Exception as error:  # the exception depends on which part is missing
        pytest.skip(f"no EGL: {type(error).__name__}: {error}")


def frames_of(gif):
    with Image.open(io.BytesIO(gif)) as image:
        frames = []
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
        return frames, image.info["duration"]


@pytest.mark.parametrize(("env_id", "every"), [("Ant-v2-4x2", 1), ("Hopper-v2-3x1", 7), ("manyagent_swimmer-2x1", 3)])
def test_a_film_shows_the_robot_move_in_real_time(env_id, every, opengl):
    envs = MaMuJoCoVecEnv(env_id, 2)
    envs.reset()
    film = films.Film(envs)
    draw = np.random.default_rng(0)
    for _ in range(3 * every):
        film()
        envs.step(draw.uniform(envs.action_space.low, envs.action_space.high))
    frames, milliseconds = frames_of(film.take())
    assert len(frames) == 3 and frames[0].shape == (360, 480, 3)
    assert milliseconds == pytest.approx(1000 * every * envs.task.dt, abs=5)
    assert all(len(np.unique(frame.reshape(-1, 3), axis=0)) > 3 for frame in frames), "not blank"
    assert not np.array_equal(frames[0], frames[-1])


def test_a_film_is_no_longer_than_its_limit_and_begins_anew(opengl, monkeypatch):
    monkeypatch.setattr(films, "MAX_FRAMES", 2)
    envs = MaMuJoCoVecEnv("HalfCheetah-v2-2x3", 1)
    film = films.Film(envs)
    for _ in range(2):
        for _ in range(5):
            film()
        assert len(frames_of(film.take())[0]) <= 2  # a GIF stores equal frames in a row as one
        assert film.positions == [] and film.steps == 0


def first_frame(film):
    film.positions, film.steps = [], 0
    film()
    return np.asarray(next(film.draw()))


def test_films_do_not_disturb_each_other(opengl):
    ant, hopper = (films.Film(MaMuJoCoVecEnv(env_id, 1)) for env_id in ("Ant-v2-4x2", "Hopper-v2-3x1"))
    before, other = first_frame(ant), first_frame(hopper)
    assert not np.array_equal(before, other)
    assert np.array_equal(before, first_frame(ant))
    del hopper
    assert np.array_equal(before, first_frame(ant))


# ---- Colours ----
@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        ("Ant-v2-4x2", {"torso": [], "front_left_leg": [], "aux_1": [0], "aux_2": [1], "aux_4": [3]}),
        ("HalfCheetah-v2-3x2", {"torso": [], "bthigh": [1], "bshin": [0], "bfoot": [0], "fthigh": [2], "ffoot": [1]}),
        ("Humanoid-v2-9|8", {"torso": [], "pelvis": [0], "right_thigh": [1], "right_foot": [1], "left_upper_arm": [0]}),
        ("Humanoid-v2-17x1", {"lwaist": [3, 4], "right_thigh": [12, 13, 14], "right_foot": [15]}),
        ("Reacher-v2-2x1", {"body0": [0], "body1": [1], "fingertip": [1], "target": []}),
        ("coupled_half_cheetah-1p1", {"torso": [], "bfoot": [0], "second_torso": [], "second_ffoot": [1]}),
        ("manyagent_swimmer-2x2", {"torso": [], "mid0": [0], "mid1": [0], "mid2": [1], "mid3": [1]}),
    ],
)
def test_bodies_belong_to_the_agents_whose_joints_move_them(env_id, expected):
    envs = MaMuJoCoVecEnv(env_id, 1)
    agents = films.agents_of_bodies(envs)
    assert {name: agents[envs.task.model.body(name).id] for name in expected} == expected


@pytest.mark.parametrize("env_id", ["Ant-v2-4x2", "HalfCheetah-v2-2x3", "Hopper-v2-3x1", "Humanoid-v2-17x1"])
def test_a_film_shows_each_agent_in_its_colour_on_a_floor_of_two_greys(env_id, opengl):
    envs = MaMuJoCoVecEnv(env_id, 1)
    film = films.Film(envs)
    film()
    pixels = frames_of(film.take())[0][0].reshape(-1, 3)
    for grey in (films.FLOOR, films.TILE):
        assert (pixels == round(255 * grey)).all(1).mean() > 0.3
    for agent in range(envs.num_agents):
        shades = np.round(255 * np.outer(films.SHADES, agent_colour(agent)))
        visible = (pixels[:, None] == shades).all(2).any(1).sum()
        assert visible > 20 or env_id.startswith("Humanoid") and "left" in parse_env_id(env_id)[2][agent][0], agent


def test_colours_of_agents_differ():
    colours = [agent_colour(agent) for agent in range(22)]
    assert len(set(colours)) == 21 and colours[21] == colours[0]
    assert np.min(colours) >= 0 and np.max(colours) <= 1


def test_filming_changes_nothing_in_the_simulation(opengl):
    class Walk:
        low = torch.zeros(1)

        def effective_layers(self):
            return None

        def act(self, obs, layers):
            return 0.5 * torch.sin(50 * obs[:, :, :2])

    results = []
    for filmed in (False, True):
        envs = MaMuJoCoVecEnv("Ant-v2-4x2", 2, episode_limit=20)
        before = {name: getattr(envs.task.model, name).copy() for name in ("geom_rgba", "geom_size", "light_diffuse")}
        film = films.Film(envs) if filmed else None
        result = script.evaluate(Walk(), envs, 1, film)
        if filmed:
            assert len(frames_of(film.take())[0]) == 20
        results.append([*result, envs.get_state()["physics"]])
        assert all(np.array_equal(getattr(envs.task.model, name), value) for name, value in before.items())
    assert all(np.array_equal(*pair) for pair in zip(*results, strict=True))


# ---- Camera ----
def test_the_camera_follows_the_robot_and_does_not_bob():
    seconds = np.arange(0, 8, 0.05)
    straight = np.outer(seconds, (3.0, -0.5, 0.0)) + (1.0, 2.0, 0.7)
    assert np.allclose(films.smooth(straight, 40), straight)
    bobbing = straight + 0.1 * np.sin(2 * np.pi * 2.3 * seconds)[:, None]
    middle = slice(20, -20)
    assert np.abs(films.smooth(bobbing, 40) - straight)[middle].max() < 0.003
    assert films.smooth(straight[:1], 40).shape == (1, 3)


def test_the_floor_moves_with_the_robot_in_the_middle(opengl):
    envs = MaMuJoCoVecEnv("Ant-v2-4x2", 1)
    film = films.Film(envs)
    places = []
    for shift in (0.0, 30.0, 30.5):
        film.positions = [envs.task.qpos[0] + np.r_[shift, np.zeros(envs.task.model.nq - 1)]]
        places.append(np.asarray(next(film.draw())).astype(int))
        assert film.camera.lookat[0] == pytest.approx(film.data.subtree_com[1, 0])
    changed = (np.abs(places[1] - places[0]) > 8).any(2).mean(), (np.abs(places[2] - places[0]) > 8).any(2).mean()
    assert changed[0] < 0.01, "30 m are a whole number of squares"
    assert 0.1 < changed[1] < 0.9, "the floor has moved, the robot has not"


@pytest.mark.parametrize(
    "env_id", ["Hopper-v2-3x1", "manyagent_swimmer-10x2", "manyagent_swimmer-50x2", "coupled_half_cheetah-1p1"]
)
def test_the_picture_holds_the_whole_robot_as_it_starts(env_id, opengl):
    envs = MaMuJoCoVecEnv(env_id, 1)
    frame = first_frame(films.Film(envs))
    robot = np.ptp(frame.astype(int), axis=2) > 30  # coloured pixels
    rows, columns = np.flatnonzero(robot.any(1)), np.flatnonzero(robot.any(0))
    assert rows[0] > 5 and rows[-1] < 354 and columns[0] > 5 and columns[-1] < 474
    assert max(np.ptp(rows) / 360, np.ptp(columns) / 480) > 0.3


# ---- Scripts ----
def test_evaluations_are_filmed(opengl, without_screen, tmp_path):
    code, out, err = run_main(script, *TINY.split(), "--capture-video", cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    films = {path.name: path.read_bytes() for path in folder.glob("*.gif")}
    assert set(films) == {"evaluation_40.gif", "evaluation_80.gif"}
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Images("videos/evaluation")
    assert [event.step for event in events] == [40, 80]
    assert [event.encoded_image_string for event in events] == list(films.values())
    assert (events[0].width, events[0].height) == (480, 360)
    flags = ["--capture-video", "--render", "--eval-episodes", 1, "--device", "cpu"]
    code, out, err = run_process(script, "--evaluate", folder / "model.pt", *flags, cwd=tmp_path)
    assert code == 0 and out.splitlines()[-1] == str(folder / "model.gif"), err
    assert len(frames_of((folder / "model.gif").read_bytes())[0]) >= 1


def refused(run, *flags, cwd, **environment):
    code, _, err = run(script, *flags, cwd=cwd, **environment)
    assert code == 2 and one_line(err), err
    assert not (cwd / "runs").exists()
    return err


def test_no_opengl_is_one_line(without_screen, tmp_path):
    said = refused(run_process, *TINY.split(), "--capture-video", cwd=tmp_path, PYOPENGL_PLATFORM="glx")
    assert "--capture-video" in said and "libegl1" in said


def test_no_screen_is_one_line(without_screen, tmp_path):
    (tmp_path / "before").mkdir()
    code, _, err = run_main(script, *TINY.split(), cwd=tmp_path / "before")
    assert code == 0, err
    (model,) = tmp_path.glob("before/runs/*/model.pt")
    assert not list(model.parent.glob("*.gif"))
    assert "--render" in refused(run_main, "--evaluate", model, "--render", "--device", "cpu", cwd=tmp_path)
    assert "--render" in refused(run_process, *TINY.split(), "--render", cwd=tmp_path)


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for Weights & Biases: a list of what init was given."""
    module, calls = types.ModuleType("wandb"), []
    module.init = lambda **settings: calls.append(settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_weights_and_biases_get_what_tensorboard_gets(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "masks")
    flags = ["--track", "--checkpoint-interval", "40"]
    code, _, err = run_main(script, *TINY.split(), *flags, cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    (call,) = wandb
    assert call["sync_tensorboard"] and call["project"] == "masks" and call["id"] == call["name"] == folder.name
    assert call["config"]["env_id"] == "Hopper-v2-3x1" and call["resume"] == "allow"
    assert list(folder.glob("events*")), "TensorBoard is written all the same"
    code, _, err = run_main(script, "--resume", folder, "--total-timesteps", 120, cwd=tmp_path)
    assert code == 0, err
    assert [call["id"] for call in wandb] == [folder.name] * 2, "a resumed run is the same run"


def test_weights_and_biases_refusing_is_one_line(wandb, tmp_path, monkeypatch):
    def refuse(**settings):
        raise RuntimeError("no login")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    code, _, err = run_main(script, *TINY.split(), "--track", cwd=tmp_path)
    assert code == 2 and one_line(err) and "no login" in err, err
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="Weights & Biases is installed")
def test_no_weights_and_biases_is_one_line(tmp_path):
    code, _, err = run_main(script, *TINY.split(), "--track", cwd=tmp_path)
    assert code == 2 and one_line(err) and "pip install wandb" in err, err
    assert not list((tmp_path / "runs").iterdir())
