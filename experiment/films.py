"""Films an episode without a screen, or shows it in a window. Both colour the robot by agent and follow it.

    film = Film(envs)
    film()              # before every step: remember the first environment's positions, if a frame is due
    gif = film.take()   # draw the frames, return them as the bytes of a GIF, and begin a new film

Each agent has a colour (experiment/agent_colours.py). The body that its joint moves has this colour, and so does all
that hangs on the body, up to the next agent's joint. A body that joints of several agents move has a band for each.
Grey bodies have no agent. Films draw a copy of the model, so they change nothing in the simulation.

Films need OpenGL. They use EGL unless the environment variable MUJOCO_GL names another way (osmesa, glx). Without a
GPU, Mesa's EGL works (Debian: libegl1 and libgl1).
"""

import copy
import io
import os
import sys
import time

import mujoco
import numpy as np
from mujoco.rendering.classic import gl_context
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from experiment.agent_colours import NUM_COLOURS, agent_colour
from experiment.command_line import fail, warn
from mamujoco_env import parse_env_id

HEIGHT, WIDTH = 360, 480
MAX_FRAMES = 160
MIN_SECONDS = 0.05  # between two frames
SMOOTH_SECONDS = 2.0  # the camera follows the robot's mean position over this time, so it does not bob with the robot
SHADES = np.linspace(0.4, 1.0, 6)  # of each colour in a GIF; fewer make it smaller
FIELD_OF_VIEW = 25.0  # degrees, from the picture's top to its bottom
FLOOR, TILE, ROBOT, OBJECT = 0.92, 0.84, 0.45, 0.15  # greys: 0 is black, 1 is white


# ---- The robot in the colours of its agents ----
def agents_of_bodies(envs):
    """For each body, the agents whose joints move it (a list of lists); without such joints, its parent's agents."""
    model, agents = envs.task.model, [[]]
    _, _, joints = parse_env_id(envs.env_id)
    agent_of = {model.joint(joint).id: agent for agent, own in enumerate(joints) for joint in own}
    for body in range(1, model.nbody):
        first = model.body_jntadr[body]
        own = [agent_of[i] for i in range(first, first + model.body_jntnum[body]) if i in agent_of]
        agents.append(sorted(set(own)) or agents[model.body_parentid[body]])
    return agents


def coloured_model(envs):
    """A copy of the task's model, coloured by agent, with even light and a floor without end.

    Returns (model, roots, bands, camera): `roots` (R,) are the bodies on which the agents' robots hang; `bands`
    {geom: agents} are the capsules that several agents move, which the model shows in the first one's colour.
    """
    model, agents, bands = copy.copy(envs.task.model), agents_of_bodies(envs), {}
    roots = np.unique([model.body_rootid[body] for body in range(model.nbody) if agents[body]])
    model.geom_matid[:] = -1  # no textures
    for geom, body in enumerate(model.geom_bodyid):
        grey = ROBOT if body == 0 or model.body_rootid[body] in roots else OBJECT
        model.geom_rgba[geom] = *(agent_colour(agents[body][0]) if agents[body] else (grey,) * 3), 1.0
        if len(agents[body]) > 1 and model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_CAPSULE:
            bands[geom] = agents[body]
    camera = camera_on_robot(model, roots)
    model.vis.global_.fovy = FIELD_OF_VIEW
    model.vis.map.znear = 0.1 * camera.distance / model.stat.extent  # sharper depths: they tell floor and tiles apart
    model.vis.quality.offsamples = 0  # no blended colours at edges: a GIF has no room for them
    model.light_type[:] = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
    model.light_ambient[:], model.light_diffuse[:], model.light_specular[:] = 0.0, 0.3, 0.0
    light = model.vis.headlight
    light.ambient[:], light.diffuse[:], light.specular[:] = 0.6 if model.nlight else 0.9, 0.25, 0.0
    floor = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    model.geom_size[floor, :2] = 0.0  # a plane of size 0 has no end
    model.geom_rgba[floor, :3] = FLOOR / (0.9 + 0.25 * np.sin(np.deg2rad(-camera.elevation)))  # FLOOR in this light
    return model, roots, bands, camera


def camera_on_robot(model, roots):
    """A camera that shows the whole robot as it starts: a tall robot from the side, a flat one more from above."""
    data, camera = mujoco.MjData(model), mujoco.MjvCamera()
    mujoco.mj_forward(model, data)
    moving = np.isin(model.body_rootid[model.geom_bodyid], roots)
    box = (np.abs(data.geom_xmat[moving].reshape(-1, 3, 3)) * model.geom_aabb[moving, None, 3:]).sum(-1)
    ends = np.abs(data.geom_xpos[moving] - data.subtree_com[roots].mean(0)) + box  # (geoms, 3) from the centre of mass
    reach, height = np.hypot(ends[:, 0], ends[:, 1]).max(), ends[:, 2].max()
    camera.type, camera.trackbodyid, camera.azimuth = mujoco.mjtCamera.mjCAMERA_TRACKING, roots[0], 90.0
    camera.elevation = -np.clip(50.0 - 40.0 * height / reach, 22.0, 50.0)
    slope = np.deg2rad(-camera.elevation)
    half_height = max(height * np.cos(slope) + reach * np.sin(slope), reach * HEIGHT / WIDTH)  # of the picture
    camera.distance = 1.25 * half_height / np.tan(np.deg2rad(FIELD_OF_VIEW / 2))
    return camera


def smooth(path, width):
    """The moving mean of path (T, 3) over about `width` rows, weighted by a Hann window; it keeps a straight path."""
    half = max(width // 2, 1)
    weights = np.hanning(2 * half + 3)[1:-1]
    padded = np.pad(path, ((half, half), (0, 0)), mode="reflect", reflect_type="odd")
    return np.stack([np.convolve(column, weights / weights.sum(), mode="valid") for column in padded.T], axis=1)


class Film:
    """A film of the first of `envs`, a MaMuJoCoVecEnv, in real time. Raises RuntimeError if OpenGL does not work."""

    def __init__(self, envs):
        self.envs = envs
        self.model, self.roots, self.bands, self.camera = coloured_model(envs)
        try:
            if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
                from mujoco.egl import GLContext

                gl_context.GLContext = GLContext  # MuJoCo chose when it was imported, and its choice needs a screen
            self.renderer = mujoco.Renderer(self.model, HEIGHT, WIDTH)
        except Exception as error:  # the exception depends on which part of OpenGL is missing
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        for slow in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[slow] = 0
        self.data = mujoco.MjData(self.model)
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        self.every = max(1, -(-MIN_SECONDS // envs.task.dt))  # steps from frame to frame
        self.frame_seconds = self.every * envs.task.dt
        self.smooth_frames = round(SMOOTH_SECONDS / self.frame_seconds)
        self.floors = np.flatnonzero(self.model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE)
        far = self.camera.distance
        # metres; the scene has room for so many tiles
        self.tile = 1.0 if 1.0 < far < 50.0 else 10.0 ** round(np.log10(far / 10))
        agents = (agent_colour(agent) for agent in range(min(envs.num_agents, NUM_COLOURS)))
        colours = [*agents, *((grey,) * 3 for grey in (FLOOR, TILE, ROBOT, OBJECT))]
        self.palette = np.round(255 * SHADES[:, None, None] * colours).astype(np.uint8).tobytes()
        self.positions, self.steps = [], 0

    def __call__(self):
        """Remember the positions for a frame, if one is due and there are less than MAX_FRAMES."""
        if self.steps % self.every == 0 and len(self.positions) < MAX_FRAMES:
            self.positions.append(self.envs.task.qpos[0].copy())
        self.steps += 1

    def show(self, qpos):
        """Put the robot at these positions (nq,). Returns where its centre of mass is, (3,)."""
        self.data.qpos[:] = qpos
        mujoco.mj_forward(self.model, self.data)
        return self.data.subtree_com[self.roots].mean(0)

    def add(self, kind, size, place, rotation, colour):
        """Add a shape to the scene, which holds the model's geoms."""
        scene = self.renderer.scene
        mujoco.mjv_initGeom(scene.geoms[scene.ngeom], kind, size, place, rotation, np.float32([*colour, 1.0]))
        scene.ngeom += 1

    def add_bands(self):
        """Give each capsule that several agents move a ring for each of them, one after the other along its axis."""
        for geom, agents in self.bands.items():
            radius, half, _ = self.model.geom_size[geom]
            place, rotation = self.data.geom_xpos[geom], self.data.geom_xmat[geom]
            axis, width = rotation.reshape(3, 3)[:, 2], half / len(agents)
            for i, agent in enumerate(agents):
                size, middle = (1.02 * radius, width, 0.0), place + ((2 * i + 1) * width - half) * axis
                self.add(mujoco.mjtGeom.mjGEOM_CYLINDER, size, middle, rotation, agent_colour(agent))

    def add_tiles(self, floor):
        """Draw every second square of this geom, a horizontal plane, darker, wherever the camera may see it."""
        level, colour = self.model.geom_pos[floor, 2], self.model.geom_rgba[floor, :3] * TILE / FLOOR
        (x, y, z), up = self.camera.lookat, np.deg2rad(-self.camera.elevation)
        half, tile = np.deg2rad(FIELD_OF_VIEW / 2), self.tile
        behind, height = self.camera.distance * np.cos(up), self.camera.distance * np.sin(up) + z - level
        near, far = (y - behind + height / np.tan(up + angle) for angle in (half, -half))
        side = height / np.sin(up - half) * np.tan(half) * WIDTH / HEIGHT
        size, upright = np.array([tile / 2, tile / 2, 1.0]), np.eye(3).ravel()
        for i in range(int((x - side) // tile), int((x + side) // tile) + 1):
            for j in range(int(near // tile), int(far // tile) + 1):
                if (i + j) % 2:
                    place = np.array([(i + 0.5) * tile, (j + 0.5) * tile, level + 2e-3 * tile])  # just above the floor
                    self.add(mujoco.mjtGeom.mjGEOM_PLANE, size, place, upright, colour)

    def draw(self):
        """Draw the remembered positions: yields an image (480 x 360) for each."""
        path = smooth(np.array([self.show(qpos) for qpos in self.positions]), self.smooth_frames)
        for qpos, lookat in zip(self.positions, path, strict=True):
            self.show(qpos)
            self.camera.lookat = lookat
            self.renderer.update_scene(self.data, self.camera)
            self.add_bands()
            for floor in self.floors:
                self.add_tiles(floor)
            yield Image.fromarray(self.renderer.render())

    def take(self):
        """The bytes of a GIF (480 x 360) of the frames since the last take."""
        palette = Image.new("P", (1, 1))
        palette.putpalette(self.palette)
        first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.draw())
        milliseconds = 10 * round(100 * self.frame_seconds)  # GIFs count hundredths of a second
        file = io.BytesIO()
        first.save(file, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
        self.positions, self.steps = [], 0
        return file.getvalue()


class Window:
    """Shows the first of `envs` in MuJoCo's viewer, in real time. Raises RuntimeError if there is no screen."""

    def __init__(self, envs):
        self.envs, (self.model, _, _, camera) = envs, coloured_model(envs)
        try:
            import mujoco.viewer

            if os.name == "posix" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
                raise RuntimeError("no screen")
            self.data = mujoco.MjData(self.model)
            self.viewer = mujoco.viewer.launch_passive(self.model, self.data, show_left_ui=False, show_right_ui=False)
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
            mujoco.mj_forward(self.model, self.data)
        self.viewer.sync()
        time.sleep(max(self.next_frame - time.monotonic(), 0))
        self.next_frame = max(self.next_frame + self.envs.task.dt, time.monotonic())

    def close(self):
        self.viewer.close()


# ---- For scripts ----
def open_viewer(args, envs):
    """A Film of `envs` for --capture-video, a Window for --render, else None. Returns None if `envs` is None."""
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
    """If the viewer is a Film, write its GIF to the folder and to TensorBoard, which shows it moving."""
    if isinstance(viewer, Film):
        gif = viewer.take()
        image = Summary.Image(height=HEIGHT, width=WIDTH, colorspace=3, encoded_image_string=gif)
        writer.add_summary(Summary(value=[Summary.Value(tag="videos/evaluation", image=image)]), global_step)
        write_gif(gif, os.path.join(run_folder, f"evaluation_{global_step}.gif"))


def write_gif(gif, path):
    """Write the bytes of a GIF. Returns True if the file was written; if not, a line on stderr says why."""
    try:
        with open(path, "wb") as file:
            file.write(gif)
    except OSError as error:
        warn(f"{path}: {error.strerror or error}; it was not written")
        return False
    return True
