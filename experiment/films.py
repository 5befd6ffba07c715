"""Films an episode without a screen, or shows it in a window. Both are called at every step of the environments.

    film = Film(envs)
    film()              # takes a frame of the first environment
    gif = film.take()   # the frames so far as the bytes of a GIF, and begins a new film

Films need OpenGL, by EGL unless the environment variable MUJOCO_GL names another way (osmesa, glx). Without a GPU,
Mesa's will do (Debian's libegl1 and libgl1).
"""

import io
import os
import sys
import time

import mujoco
import numpy as np
from mujoco.rendering.classic import gl_context
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from experiment.command_line import fail, warn

HEIGHT, WIDTH = 240, 320
MAX_FRAMES = 160
MIN_SECONDS = 0.05  # between two frames


def camera_on_robot(model, data):
    """A camera that follows the first body from the side, at a distance that shows all of the robot as it starts."""
    mujoco.mj_forward(model, data)
    moving = model.geom_bodyid > 0
    reach = np.linalg.norm(data.geom_xpos[moving] - data.xpos[1], axis=1) + model.geom_rbound[moving]
    camera = mujoco.MjvCamera()
    camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
    camera.distance, camera.azimuth, camera.elevation = min(2.4 * float(reach.max()), 12.0), 90.0, -20.0
    return camera


class Film:
    """Frames of the first of `envs`, a MaMuJoCoVecEnv, in real time. Raises RuntimeError where OpenGL does not work."""

    def __init__(self, envs):
        self.envs, model = envs, envs.task.model
        try:
            if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
                from mujoco.egl import GLContext

                gl_context.GLContext = GLContext  # MuJoCo chose when it was imported, and what it chose needs a screen
            self.renderer = mujoco.Renderer(model, HEIGHT, WIDTH)
        except Exception as error:  # what is raised depends on which part of OpenGL is missing
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        for slow in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[slow] = 0
        self.data = mujoco.MjData(model)
        self.camera = camera_on_robot(model, self.data)
        self.every = max(1, -(-MIN_SECONDS // envs.task.dt))  # steps from frame to frame
        self.frames, self.steps = [], 0

    def __call__(self):
        """Take a frame, if one is due and there are less than MAX_FRAMES."""
        if self.steps % self.every == 0 and len(self.frames) < MAX_FRAMES:
            self.envs.batch.get_data(0, self.data)
            mujoco.mj_forward(self.envs.task.model, self.data)
            self.renderer.update_scene(self.data, self.camera)
            self.frames.append(Image.fromarray(self.renderer.render()))
        self.steps += 1

    def take(self):
        """The bytes of a GIF (320 x 240) of the frames since the last take."""
        palette = self.frames[0].quantize(64)  # few colours, without dithering, pack well
        first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames)
        milliseconds = 10 * round(100 * self.every * self.envs.task.dt)  # GIFs count hundredths of a second
        file = io.BytesIO()
        first.save(file, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
        self.frames, self.steps = [], 0
        return file.getvalue()


class Window:
    """Shows the first of `envs` in MuJoCo's viewer, in real time. Raises RuntimeError where there is no screen."""

    def __init__(self, envs):
        try:
            import mujoco.viewer

            self.envs, self.data = envs, mujoco.MjData(envs.task.model)
            if os.name == "posix" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
                raise RuntimeError("no screen")
            model, camera = envs.task.model, camera_on_robot(envs.task.model, self.data)
            self.viewer = mujoco.viewer.launch_passive(model, self.data, show_left_ui=False, show_right_ui=False)
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        for name in ("type", "trackbodyid", "distance", "azimuth", "elevation"):
            setattr(self.viewer.cam, name, getattr(camera, name))
        self.next_frame = time.monotonic()

    def __call__(self):
        if not self.viewer.is_running():  # the user has closed it
            return
        with self.viewer.lock():
            self.envs.batch.get_data(0, self.data)
            mujoco.mj_forward(self.envs.task.model, self.data)
        self.viewer.sync()
        time.sleep(max(self.next_frame - time.monotonic(), 0))
        self.next_frame = max(self.next_frame + self.envs.task.dt, time.monotonic())

    def close(self):
        self.viewer.close()


# ---- For scripts ----
def open_viewer(args, envs):
    """Of `envs` or None: the Film that --capture-video asks for, the Window that --render asks for, or None."""
    if envs is None:
        return None
    try:
        return Film(envs) if args.capture_video else Window(envs) if args.render else None
    except RuntimeError as error:
        flag, needs = "--render", "a screen"
        if args.capture_video:
            flag, needs = "--capture-video", "OpenGL: EGL (Debian: libegl1, libgl1), or MUJOCO_GL set"
        fail(f"{flag}: {' '.join(str(error).split())[:200]}; expected {needs}")


def save_film(viewer, run_folder, writer, global_step):
    """Write what a Film has taken to a GIF in the folder and, as a moving image, to TensorBoard; else do nothing."""
    if isinstance(viewer, Film):
        gif = viewer.take()
        image = Summary.Image(height=HEIGHT, width=WIDTH, colorspace=3, encoded_image_string=gif)
        writer.add_summary(Summary(value=[Summary.Value(tag="videos/evaluation", image=image)]), global_step)
        write_gif(gif, os.path.join(run_folder, f"evaluation_{global_step}.gif"))


def write_gif(gif, path):
    """Write the bytes of a GIF. Returns whether the file was written; if not, a line on stderr says why."""
    try:
        with open(path, "wb") as file:
            file.write(gif)
    except OSError as error:
        warn(f"{path}: {error.strerror or error}; it was not written")
        return False
    return True
