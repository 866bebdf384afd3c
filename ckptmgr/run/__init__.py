"""The directory of a run: which steps are there, on a disk or in a bucket; what was done to them; who may write.

A new storage is added here, beside `local` and `bucket`: `directory` says what it must do, and `catalog` opens it.
"""
