"""A step on disk: names of files, the manifest and its schema, how small files are read, written and checked.

A new field goes into `Manifest`, `encode`, `decode` and `schema`. `saving/copying` fills it in, and
`orbax/reading` for steps of stock Orbax. A field of a leaf begins in `specs.LeafSpec`. Older versions ignore a
field that they do not know; if they must not, it takes a new `FORMAT`.
"""
