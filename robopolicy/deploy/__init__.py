"""From a checkpoint to a robot controller: bridge, controller loop with safety filter, policy runner."""
