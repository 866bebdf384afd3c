"""The only room that imports Orbax: it writes steps with its manager, reads its steps, and adapts its policies.

If Orbax changes, this room changes.
"""
