"""The table of tasks: what each is called, how it is told in words, and what its observations are about.

Every field of ManiSkill's `state_dict` observation belongs to exactly one modality:

    proprio   what the robot measures in itself: joint positions and velocities, tool pose, controller targets
    objects   all that depends on the state or shape of a thing in the scene, relative fields too. Contact flags such as
              `is_grasped` stand here: a real robot would have to perceive them
    goal      what depends on the goal alone, known to whoever gives the order
"""

from __future__ import annotations

from dataclasses import dataclass

from robopolicy.errors import RobopolicyError, UnknownNameError

PROPRIO_FIELDS = ("agent/qpos", "agent/qvel", "agent/controller", "extra/tcp_pose")
"""`agent/controller` holds the targets of controllers that have any (`pd_*_target_*`)."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table."""

    name: str
    env_id: str
    """ManiSkill's name of the environment."""
    instruction: str
    max_episode_steps: int
    control_mode: str = "pd_ee_delta_pos"
    """Default; ManiSkill's other modes work too."""
    objects: tuple[str, ...] = ()
    """Fields of the `objects` modality, or folders of fields."""
    goal: tuple[str, ...] = ()
    """Fields of the `goal` modality, or folders of fields."""
    geometry_varies: bool = False
    """Shapes are drawn per episode, so that a seeded reset has to rebuild the scene."""

    def modality_of(self, field: str) -> str:
        """Return the modality of an observation field such as `extra/obj_pose`.

        Raises:
            RobopolicyError: the table places the field nowhere, or twice.
        """
        places = {"proprio": PROPRIO_FIELDS, "objects": self.objects, "goal": self.goal}
        found = [m for m, entries in places.items() if any(field == e or field.startswith(f"{e}/") for e in entries)]
        if len(found) != 1:
            raise RobopolicyError(
                f"{self.env_id} observes {field!r}, which task {self.name!r} puts into "
                f"{' and '.join(found) or 'no modality'}; list it once, under `objects` or `goal`."
            )
        return found[0]


def _extra(*names: str) -> tuple[str, ...]:
    return tuple(f"extra/{name}" for name in names)


_ROWS = (
    Task(
        name="push_cube",
        env_id="PushCube-v1",
        instruction="Push the cube forward onto the round target.",
        max_episode_steps=100,
        objects=_extra("obj_pose"),
        goal=_extra("goal_pos"),
    ),
    Task(
        name="pull_cube",
        env_id="PullCube-v1",
        instruction="Pull the cube back onto the round target.",
        max_episode_steps=100,
        objects=_extra("obj_pose"),
        goal=_extra("goal_pos"),
    ),
    Task(
        name="pick_cube",
        env_id="PickCube-v1",
        instruction="Pick up the cube and hold it at the green marker.",
        max_episode_steps=100,
        objects=_extra("is_grasped", "obj_pose", "tcp_to_obj_pos", "obj_to_goal_pos"),
        goal=_extra("goal_pos"),
    ),
    Task(
        name="stack_cube",
        env_id="StackCube-v1",
        instruction="Stack the red cube on the green cube and let go.",
        max_episode_steps=200,
        objects=_extra("cubeA_pose", "cubeB_pose", "tcp_to_cubeA_pos", "tcp_to_cubeB_pos", "cubeA_to_cubeB_pos"),
    ),
    Task(
        name="lift_peg_upright",
        env_id="LiftPegUpright-v1",
        instruction="Set the lying peg upright on the table.",
        max_episode_steps=200,
        control_mode="pd_ee_delta_pose",
        objects=_extra("obj_pose"),
    ),
    Task(
        name="peg_insertion_side",
        env_id="PegInsertionSide-v1",
        instruction="Pick up the peg and insert its orange end into the hole of the box.",
        max_episode_steps=300,
        control_mode="pd_ee_delta_pose",
        objects=_extra("peg_pose", "peg_half_size", "box_hole_pose", "box_hole_radius"),
        geometry_varies=True,
    ),
    Task(
        name="push_t",
        env_id="PushT-v1",
        instruction="Push the T-shaped block onto the grey T on the table.",
        max_episode_steps=150,
        control_mode="pd_ee_delta_pose",
        objects=_extra("obj_pose"),
        goal=_extra("goal_pos"),
    ),
    Task(
        name="poke_cube",
        env_id="PokeCube-v1",
        instruction="Grasp the peg and push the cube onto the target with its blue end.",
        max_episode_steps=150,
        control_mode="pd_ee_delta_pose",
        # ManiSkill's `goal_pos` of this task is the position of the peg, so it is no goal.
        objects=_extra(
            "cube_pose",
            "peg_pose",
            "goal_pos",
            "tcp_to_peg_pos",
            "peg_to_cube_pos",
            "cube_to_goal_pos",
            "peghead_to_cube_pos",
        ),
    ),
    Task(
        name="roll_ball",
        env_id="RollBall-v1",
        instruction="Push the ball so that it rolls onto the target at the far end of the table.",
        max_episode_steps=80,
        control_mode="pd_joint_delta_pos",
        objects=_extra("ball_pose", "ball_vel", "tcp_to_ball_pos", "ball_to_goal_pos"),
        goal=_extra("goal_pos"),
    ),
    Task(
        name="plug_charger",
        env_id="PlugCharger-v1",
        instruction="Pick up the charger and plug it into the receptacle.",
        max_episode_steps=300,
        control_mode="pd_ee_delta_pose",
        # The goal pose follows from the receptacle, which has to be perceived.
        objects=_extra("charger_pose", "receptacle_pose", "goal_pose"),
    ),
    Task(
        name="two_goal",
        env_id="TwoGoalReach-v1",
        instruction="Move the tool to either of the two green markers.",
        max_episode_steps=50,
        goal=_extra("goal_positions"),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}
"""Open to additions: `TASKS["mine"] = Task(name="mine", env_id="Mine-v1", ...)`."""


def find_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        UnknownNameError: no such task; suggests the nearest.
    """
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS)
    return TASKS[name]
