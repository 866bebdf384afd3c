"""This process and the others of its job: agreement, the thread behind `save`, signals, the end of the script.

Nothing here knows what a checkpoint is.
"""
