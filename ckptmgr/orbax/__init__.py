"""The only room that imports Orbax: its manager writes a step, what stock wrote is read, its policies are adapted.

If Orbax changes, this room changes.
"""
