"""Cameras: what an observation mode means, coarse meshes, keypoints, and pictures that are not drawn in vain."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from deploy_peers import StillArm, robot_data, until
from fakes import fake_batch, fake_observation, fake_spec, fit_to_bounds
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scripted_planner import ScriptedPlanner, joint_spec, stay
from torch import Tensor

from robopolicy.app import composing
from robopolicy.app.build import build_policy
from robopolicy.app.run_config import collect_command, task_words
from robopolicy.deploy.observations import needed_streams
from robopolicy.deploy.remote import RemoteRobot
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.session import Session
from robopolicy.deploy.sim_robot import SimRobot
from robopolicy.deploy.sim_server import RosbridgeServer
from robopolicy.envs import make, vulkan
from robopolicy.envs.backends import building
from robopolicy.envs.demo_files import Episode, leaves, read_all, stack, write_episode
from robopolicy.envs.demo_worker import Demonstrator, Recipe, Rejected, _to_numpy
from robopolicy.envs.meshes import cluster, flatten
from robopolicy.envs.playback import Shortening
from robopolicy.envs.rendering import load_maniskill
from robopolicy.envs.specs import ObsMode, build_stock, task_spec
from robopolicy.envs.stepping import SteppedRobot
from robopolicy.errors import UnknownNameError
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.nn.image import ImageEncoder, cut, in_whole_image, spatial_softmax
from robopolicy.policies.actors import ChunkActor
from robopolicy.timing import ChunkTiming
from robopolicy.types import ModalitySpec, Observation

needs_vulkan = pytest.mark.skipif(not vulkan.prepare_vulkan().is_usable, reason=f"needs {vulkan.INSTALL_VULKAN}")


# ---- observation modes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["state", "rgb", "rgb64", "rgb128"])
def test_an_observation_mode_survives_its_name(text: str) -> None:
    assert str(ObsMode.parse(text)) == text


@pytest.mark.parametrize("text", ["depth", "rgb4", "rgb2000", "rgb64x64", "state64", ""])
def test_other_modes_are_refused(text: str) -> None:
    with pytest.raises(UnknownNameError, match="Known: rgb, rgb64, state"):
        ObsMode.parse(text)


@pytest.mark.sim
@pytest.mark.parametrize(("text", "px"), [("rgb64", 64), ("rgb", 128)])
def test_a_specification_tells_the_mode_that_makes_it(text: str, px: int) -> None:
    spec = task_spec("pick_cube", obs_mode=text)
    assert list(spec.observation) == ["proprio", "goal", "rgb.base_camera"]
    assert spec.observation["rgb.base_camera"].shape == (3, px, px)
    assert task_spec("pick_cube", obs_mode=str(ObsMode.of(spec))) == spec
    assert str(ObsMode.of(task_spec("pick_cube"))) == "state"


def test_hints_name_the_short_config() -> None:
    assert task_words({"name": "pick_cube", "obs_mode": "rgb64"}) == ["task=pick_cube_rgb"]
    assert task_words({"name": "pick_cube", "obs_mode": "state"}) == ["task=pick_cube"]
    assert task_words({"name": "pick_cube", "obs_mode": "rgb"}) == ["task=pick_cube", "task.obs_mode=rgb"]
    assert task_words({"name": "plug_charger", "obs_mode": "rgb64"}) == ["task=plug_charger", "task.obs_mode=rgb64"]
    cfg: Any = composing.compose("train", ["task=pick_cube_rgb"])
    assert collect_command(cfg, ["task=pick_cube_rgb"]) == "robopolicy collect task=pick_cube_rgb"


# ---- meshes ----------------------------------------------------------------------------------------------------------
def sphere(rows: int = 60, radius: float = 0.1) -> tuple[Any, Any, Any, Any]:
    """A finely divided sphere with its normals."""
    polar, around = np.meshgrid(np.linspace(0, np.pi, rows), np.linspace(0, 2 * np.pi, rows), indexing="ij")
    normals = np.stack([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], axis=-1)
    corner = np.arange(rows * rows).reshape(rows, rows)
    a, b, c, d = corner[:-1, :-1].ravel(), corner[1:, :-1].ravel(), corner[1:, 1:].ravel(), corner[:-1, 1:].ravel()
    triangles = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    flat = normals.reshape(-1, 3)
    return radius * flat, triangles, flat, np.zeros((len(flat), 2))


def area(vertices: Any, triangles: Any) -> float:
    a, b, c = (vertices[triangles[:, k]] for k in range(3))
    return float(0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1).sum())


@pytest.mark.parametrize("cell_m", [0.004, 0.008, 0.016])
def test_a_coarse_mesh_stays_within_a_cell_of_the_fine_one(cell_m: float) -> None:
    mesh = sphere()
    vertices, triangles, normals, uvs = cluster(mesh, cell_m)
    assert len(vertices) == len(normals) == len(uvs)
    assert triangles.max() < len(vertices)
    assert np.abs(np.linalg.norm(vertices, axis=1) - 0.1).max() < cell_m * 3**0.5
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert (vertices * normals).sum(axis=1).min() > 0  # outwards still
    assert area(vertices, triangles) == pytest.approx(area(mesh[0], mesh[1]), rel=0.1)
    assert len(triangles) < len(mesh[1]) * (1.0 if cell_m == 0.004 else 0.6)


def grid(cells: int = 40, side: float = 100.0) -> tuple[Any, Any, Any, Any]:
    """A level square in many triangles, with a texture laid evenly over it."""
    x, y = np.meshgrid(*2 * [np.linspace(-side / 2, side / 2, cells + 1)], indexing="ij")
    vertices = np.stack([x.ravel(), y.ravel(), np.full(x.size, 0.3)], axis=1)
    corner = np.arange(x.size).reshape(x.shape)
    a, b, c, d = corner[:-1, :-1].ravel(), corner[1:, :-1].ravel(), corner[1:, 1:].ravel(), corner[:-1, 1:].ravel()
    triangles = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    return vertices, triangles, np.tile([0.0, 0.0, 1.0], (len(vertices), 1)), vertices[:, :2] / 4 + 0.5


def test_an_even_floor_becomes_two_triangles() -> None:
    mesh = grid()
    found = flatten(mesh)
    assert found is not None
    vertices, triangles, normals, uvs = found
    assert len(triangles) == 2
    assert area(vertices, triangles) == pytest.approx(area(mesh[0], mesh[1]))
    np.testing.assert_allclose(uvs, vertices[:, :2] / 4 + 0.5, atol=1e-4)
    edges = vertices[triangles[:, 1]] - vertices[triangles[:, 0]], vertices[triangles[:, 2]] - vertices[triangles[:, 0]]
    assert (np.cross(*edges)[:, 2] > 0).all()
    assert (normals == [0, 0, 1]).all()


@pytest.mark.parametrize("spoilt", ["bump", "texture", "hole"])
def test_other_floors_stay_as_they_are(spoilt: str) -> None:
    vertices, triangles, normals, uvs = grid()
    if spoilt == "bump":
        vertices[50, 2] += 0.01
    elif spoilt == "texture":
        uvs[50] += 0.1
    else:
        triangles = triangles[40:]
    assert flatten((vertices, triangles, normals, uvs)) is None


# ---- the encoder -----------------------------------------------------------------------------------------------------
@given(
    top=st.integers(0, 6), left=st.integers(0, 8), y=st.integers(0, 5), x=st.integers(0, 6), stride=st.integers(1, 4)
)
@settings(deadline=None, max_examples=40)
def test_a_keypoint_is_where_it_is_in_the_whole_image(top: int, left: int, y: int, x: int, stride: int) -> None:
    """Whatever was cropped, cell (y, x) of a map lies on the pixel that its centre was cut from."""
    maps = torch.zeros(1, 1, 6, 7)
    maps[0, 0, y, x] = 1e3
    found = in_whole_image(spatial_softmax(maps), torch.tensor([[top, left]]), (6, 7), stride, (40, 50))
    wanted = [2 * (left + stride * x) / 49 - 1, 2 * (top + stride * y) / 39 - 1]
    torch.testing.assert_close(found, torch.tensor([wanted]), atol=1e-5, rtol=0)


def test_crops_hide_little_of_where_things_are() -> None:
    """A crop that is moved by whole strides shows the encoder the same place: its features stay what they are."""
    torch.manual_seed(0)
    encoder = ImageEncoder((3, 64, 64), widths=(8, 8), num_keypoints=4, crop_fraction=0.75).eval()
    images = -torch.ones(1, 1, 3, 64, 64)
    images[..., 28:34, 30:36] = 1.0
    maps: list[Tensor] = []
    for corner in ([4, 4], [4 + encoder.stride, 4 + 2 * encoder.stride]):
        piece = cut(images, torch.tensor([corner]), encoder.crop)[:, 0]
        seen = encoder.features(piece)[..., 2:-2, 2:-2]  # the border sees the padding
        peak = 1e4 * (seen - seen.mean(dim=(-2, -1), keepdim=True))
        shifted = torch.tensor([[corner[0] + 2 * encoder.stride, corner[1] + 2 * encoder.stride]])
        maps.append(in_whole_image(spatial_softmax(peak), shifted, seen.shape[-2:], encoder.stride, (64, 64)))
    torch.testing.assert_close(maps[0], maps[1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("px", [32, 64, 128, 256])
def test_the_maps_do_not_grow_with_the_image(px: int) -> None:
    encoder = ImageEncoder((3, px, px)).eval()
    assert max(encoder.features(torch.zeros(1, 3, *encoder.crop)).shape[-2:]) <= 16


def test_only_the_newest_images_are_looked_at() -> None:
    spec = fake_spec(camera=True)
    obs = fake_observation(spec, 4, 3, torch.Generator().manual_seed(0)).modalities
    obs = {name: value.float() for name, value in obs.items()}
    changed = {**obs, "rgb.base": obs["rgb.base"].clone()}
    changed["rgb.base"][:, :2] += 50.0
    for steps, same in ((1, True), (2, False), (None, False)):
        torch.manual_seed(0)
        image = partial(ImageEncoder, widths=(8, 8), out_dim=6)
        encoder = ObservationEncoder(spec.observation, 3, image=image, image_steps=steps).eval()
        assert encoder(obs).shape[1] == encoder.out_dim
        assert torch.equal(encoder(obs), encoder(changed)) == same
    with pytest.raises(ValueError, match=r"image_steps must be in \[1, 3\]"):
        ObservationEncoder(spec.observation, 3, image_steps=4)


def test_rgb_stands_for_every_camera() -> None:
    spec = fake_spec(camera=True)
    second = replace(spec.observation["rgb.base"], fields={"sensor_data/hand/rgb": 3})
    observation = {**spec.observation, "rgb.hand": second}
    make = partial(ObservationEncoder, observation, 2, image=partial(ImageEncoder, widths=(8, 8), out_dim=6))
    assert make(prioritised=["rgb"]).optional == ("proprio", "objects")
    assert make(prioritised=["rgb.base"]).optional == ("proprio", "objects", "rgb.hand")


def test_pictures_alone_can_be_what_is_always_there() -> None:
    """All states may be missing, so that nothing is judged: training and acting go on."""
    spec = fake_spec(camera=True)
    config = composing.compose("train", ["policy=diffusion_rgb", "policy.network.width=16"]).policy
    policy = build_policy(config, spec)
    batch = fake_batch(spec, 3, policy.timing.n_obs_steps, policy.timing.horizon)
    fit_to_bounds(policy.norm, spec)
    assert policy.train().loss(batch).isfinite()
    assert policy.eval().act(batch.obs).isfinite().all()
    blind = {
        name: torch.full_like(v, torch.nan) if v.is_floating_point() else v for name, v in batch.obs.modalities.items()
    }
    seen = policy.encoder(policy.normalized(Observation(modalities=blind)))
    assert seen.isfinite().all()


# ---- pictures that nobody looks at -----------------------------------------------------------------------------------
class WatchingPlanner:
    """Plans a chunk that tells the pictures it was shown."""

    hysteresis = 0.0

    def __init__(self, timing: ChunkTiming) -> None:
        self.spec, self.timing = fake_spec(camera=True), timing
        self.diagnostics: dict[str, Tensor] = {}
        self.shown: list[list[int]] = []

    def __call__(self, obs: Any, rows: Tensor, **_: Any) -> Tensor:
        self.shown.append(obs.modalities["rgb.base"][0, :, 0, 0, 0].tolist())
        return torch.zeros(len(rows), self.timing.horizon, self.spec.action.dim)

    def reset(self, rows: Tensor | None = None) -> None:
        pass


@pytest.mark.parametrize(("n_obs_steps", "n_action_steps"), list(itertools.product((1, 2, 3), (1, 2, 3, 8))))
def test_an_actor_knows_which_frames_its_plans_will_see(n_obs_steps: int, n_action_steps: int) -> None:
    """With blanks for all frames that nobody is said to look at, the planner is shown the same windows."""
    timing = ChunkTiming(n_obs_steps=n_obs_steps, horizon=12, n_action_steps=n_action_steps)
    shown = []
    for skips in (False, True):
        planner = WatchingPlanner(timing)
        actor, wanted, drawn = ChunkActor(planner, 1), True, 0  # type: ignore[arg-type]
        for step in range(1, 30):
            frame = {n: torch.zeros(1, *m.shape) for n, m in planner.spec.observation.items()}
            frame["rgb.base"] = torch.full((1, 3, 24, 32), step if wanted else 255, dtype=torch.uint8)
            drawn += wanted
            actor(frame)
            wanted = not skips or actor.sees_next
        shown.append(planner.shown)
        assert drawn == 29 if not skips or n_obs_steps >= n_action_steps else drawn < 29
    assert shown[0] == shown[1]


# ---- the simulation --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def envs() -> Iterator[tuple[Any, Any]]:
    """The same two environments with pictures, twice."""
    made = [make("push_cube", num_envs=2, backend="cpu", obs_mode="rgb16") for _ in range(2)]
    yield made[0], made[1]
    for env in made:
        env.close()


@needs_vulkan
@pytest.mark.sim
def test_pictures_are_skipped_where_nobody_looks_and_the_rest_goes_on(envs: tuple[Any, Any]) -> None:
    name = "rgb.base_camera"
    frames = []
    for env, skips in zip(envs, (False, True), strict=True):
        seen = [env.reset(seed=3)[0]]
        for step in range(4):
            env.skip_pictures(skips and step < 3)
            seen.append(env.step(torch.ones(2, 4))[0])
        env.skip_pictures(True)
        seen.append(env.reset(seed=4)[0])
        frames.append(seen)
    plain, skipped = frames
    assert not torch.equal(plain[3][name], plain[0][name])
    for step, (one, other) in enumerate(zip(plain, skipped, strict=True)):
        assert torch.equal(one["proprio"], other["proprio"])
        shown = plain[0] if step in (1, 2, 3) else one
        assert torch.equal(other[name], shown[name]), step


@needs_vulkan
@pytest.mark.sim
def test_a_picture_shows_the_moment_when_the_camera_looked() -> None:
    env = make("push_cube", backend="single", control_mode="pd_joint_pos", obs_mode="rgb24")
    robot = SteppedRobot(env)
    robot.reset(0)
    wanted = robot.observation()["rgb.base_camera"][0].permute(1, 2, 0).numpy()
    picture = robot.take_picture("base_camera")
    bent = robot.position()[:7] + 0.5
    for _ in range(30):
        robot.drive(bent, 0.04)
        robot.step()
    assert np.array_equal(picture(), wanted)
    assert not np.array_equal(robot.take_picture("base_camera")(), wanted)
    env.close()


def a_recording(folder: Path) -> Path:
    """Three steps of PushCube as a ManiSkill file: once said to be a success, once to fail."""
    load_maniskill()
    settings: dict[str, Any] = {"control_mode": "pd_ee_delta_pos", "sim_backend": "physx_cpu"}
    with building(rendered=False):
        env = build_stock("PushCube-v1", obs_mode="state_dict", render_backend="none", **settings)
        obs, _ = env.reset(seed=5)
        seen, states = [_to_numpy(obs)], [_to_numpy(env.get_state_dict())]
        actions = np.array([[0.5, 0, 0, 1], [0, 0.5, 0, 1], [0, 0, -1, 1]], dtype=np.float32)
        for action in actions:
            seen.append(_to_numpy(env.step(action)[0]))
            states.append(_to_numpy(env.get_state_dict()))
        env.close()
    outcomes = {"terminated": [False] * 3, "truncated": [False] * 3, "success": [False, False, True]}
    good = Episode(
        seed=5,
        reset_kwargs={"seed": 5},
        obs=stack(seen),
        env_states=stack(states),
        actions=actions,
        outcomes={name: np.array(values) for name, values in outcomes.items()},
        plan_steps=3,
    )
    path = folder / "recording.h5"
    bad = replace(good, outcomes={**good.outcomes, "success": np.zeros(3, bool)})
    with h5py.File(path, "w") as file:
        for number, episode in enumerate((good, bad)):
            write_episode(file.create_group(f"traj_{number}"), episode)
    about = {"episode_seed": 5, "reset_kwargs": {"seed": 5}, "control_mode": "pd_ee_delta_pos"}
    path.with_suffix(".json").write_text(json.dumps({"episodes": [{"episode_id": i, **about} for i in range(2)]}))
    return path


@needs_vulkan
@pytest.mark.sim
def test_pictures_are_added_to_demonstrations_without_simulating_them(tmp_path: Path) -> None:
    source = a_recording(tmp_path)
    recipe = Recipe(
        env_id="PushCube-v1",
        control_mode="pd_ee_delta_pos",
        obs_mode="rgb24",
        shortening=Shortening(),
        source=str(source),
    )
    demonstrator = Demonstrator(recipe)
    episode = demonstrator.demonstrate(0)
    with h5py.File(source) as file:
        recorded = read_all(file["traj_0"])
    for name in ("agent", "extra"):
        old, new = dict(leaves(recorded["obs"][name])), dict(leaves(episode.obs[name]))
        assert all(np.array_equal(old[field], new[field]) for field in old)
    assert np.array_equal(episode.actions, recorded["actions"])
    pictures = episode.obs["sensor_data"]["base_camera"]["rgb"].astype(int)
    assert (pictures.shape, episode.plan_steps) == ((4, 24, 24, 3), 3)
    assert np.abs(pictures[0] - pictures[3]).max() > 10
    with pytest.raises(Rejected, match="source fails"):
        demonstrator.demonstrate(1)
    demonstrator.env.close()


# ---- deployment ------------------------------------------------------------------------------------------------------
class SeeingArm(StillArm):
    """An arm without physics and a camera whose every picture is another one."""

    cameras = ("base_camera",)

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[bytes] = []

    def take_picture(self, camera: str) -> Callable[[], NDArray[np.uint8]]:
        picture = np.random.default_rng(len(self.taken)).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        self.taken.append(picture.tobytes())
        return lambda: picture


@pytest.mark.parametrize("dialect", ["ros1", "ros2"])
def test_a_session_plans_from_the_pictures_that_the_camera_took(dialect: Any) -> None:
    """From the camera through the bridge, compressed, to the policy's observation: the same bytes, in order."""
    plain = joint_spec("pd_joint_delta_pos")
    picture = ModalitySpec(shape=(3, 24, 32), fields={"sensor_data/base_camera/rgb": 3}, dtype="uint8")
    spec = replace(plain, observation={**plain.observation, "rgb.base_camera": picture})
    seen: list[NDArray[np.uint8]] = []

    def say(obs: Observation, call: int) -> Tensor:
        seen.append(obs.modalities["rgb.base_camera"][0].numpy())
        return stay(spec)(obs, call)

    file = RobotFile.from_dict(robot_data())
    server, arm = RosbridgeServer(dialect=dialect), SeeingArm()
    simulated = SimRobot(arm, file, server)
    server.start()
    simulated.start()
    robot = RemoteRobot(file, url=server.url, streams=needed_streams(spec, file))
    try:
        robot.connect(30.0)
        session = Session(robot, file, ScriptedPlanner(spec, say))
        session.open()
        try:
            assert session.begin_within(30.0) == ""
            before = len(seen)
            until(lambda: len(seen) > before + 5)
        finally:
            session.close()
    finally:
        robot.close()
        simulated.close()
        server.close()
    shown = [[frame.transpose(1, 2, 0).tobytes() for frame in window] for window in seen[before:]]
    places = [[arm.taken.index(frame) for frame in window] for window in shown]  # each is one that was taken
    assert all(older <= newer for older, newer in places)
    newest = [newer for _, newer in places]
    assert newest == sorted(newest)
    assert newest[-1] > newest[0]
