"""This process and the others of its job: their agreement, the thread behind `save`, signals, and the end.

Nothing here knows what a checkpoint is.
"""
