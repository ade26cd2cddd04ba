"""robopolicy: train robot policies in ManiSkill, measure them honestly, deploy them over ROS."""

__version__ = "0.1.0"
