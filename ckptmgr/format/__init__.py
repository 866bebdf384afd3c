"""A step on disk: names of files, the manifest and its schema, how small files are read and written.

A new field of the manifest, or a new file of ours, is added here.
"""
