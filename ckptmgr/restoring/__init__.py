"""A restore: choose the step, match it with the templates and place its leaves, read.

Damage is `CorruptCheckpointError`, raised where it is found: `restore()` then takes the step before. Any other
error ends the restore, except for a step that was deleted meanwhile. A new class of unreadable steps must also
be caught in `run/history`, `run/mirror`, `cli/facts` and `cli/report`. An item that is not read says why in
`Item.why`.
"""
