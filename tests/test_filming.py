"""Films of evaluation episodes, and what is said where there is no OpenGL, no screen, or no Weights & Biases."""

import importlib.util
import io
import sys
import types

import mujoco
import numpy as np
import pytest
from PIL import Image
from run_scripts import one_line, run_main, run_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kalei_mappo_mamujoco as script
from experiment import films
from mamujoco_env import MaMuJoCoVecEnv

TINY = "--device cpu --env-id Hopper-v2-3x1 --total-timesteps 80 --num-envs 4 --rollout-steps 10 --hidden-size 8"
TINY += " --eval-episodes 2 --eval-interval 40 --episode-limit 30 --num-threads 1 --save-model"


@pytest.fixture
def without_screen(monkeypatch):
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def opengl():
    """Skips where there is no EGL; a film that fails where there is one is a failure."""
    try:
        from mujoco.egl import GLContext

        GLContext(8, 8).free()
    except Exception as error:  # what is raised depends on which part is missing
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
    assert len(frames) == 3 and frames[0].shape == (240, 320, 3)
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
        assert len(frames_of(film.take())[0]) <= 2  # like frames in sequence are one in a GIF
        assert film.frames == [] and film.steps == 0


def test_films_do_not_disturb_each_other(opengl):
    ant, hopper = (films.Film(MaMuJoCoVecEnv(env_id, 1)) for env_id in ("Ant-v2-4x2", "Hopper-v2-3x1"))

    def frame(film):
        film()
        return np.asarray(film.frames.pop())

    before, other = frame(ant), frame(hopper)
    assert not np.array_equal(before, other)
    ant.steps = 0
    assert np.array_equal(before, frame(ant))
    del hopper
    ant.steps = 0
    assert np.array_equal(before, frame(ant))


def test_the_camera_follows_the_robot(opengl):
    envs = MaMuJoCoVecEnv("Ant-v2-4x2", 1)
    film = films.Film(envs)
    places = []
    for shift in (0.0, 30.0):
        envs.batch.get_data(0, film.data)
        film.data.qpos[0] += shift
        mujoco.mj_forward(envs.task.model, film.data)
        film.renderer.update_scene(film.data, film.camera)
        places.append(film.renderer.scene.camera[0].pos[0])
    assert places[1] - places[0] == pytest.approx(30, abs=1e-3)


def test_evaluations_are_filmed(opengl, without_screen, tmp_path):
    code, out, err = run_main(script, *TINY.split(), "--capture-video", cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    films = {path.name: path.read_bytes() for path in folder.glob("*.gif")}
    assert set(films) == {"evaluation_40.gif", "evaluation_80.gif"}
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Images("videos/evaluation")
    assert [event.step for event in events] == [40, 80]
    assert [event.encoded_image_string for event in events] == list(films.values())
    assert (events[0].width, events[0].height) == (320, 240)
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
