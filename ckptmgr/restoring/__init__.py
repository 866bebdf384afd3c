"""A restore: choose the step, match it with the templates and place its leaves, read."""
