"""Pytrees: what a tree is made of, how two differ, where its leaves are to go. Knows no files and no Orbax."""
