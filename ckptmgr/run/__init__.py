"""The directory of a run: which steps are there, on a disk or in a bucket; what was done to them; who may write.

Another bucket needs nothing here: its scheme goes into `format/paths.py` (`_NEEDS`), `arrays/database.py`
(`_base`) and `cli/doctor.py`; TensorStore, etils and fsspec must know it. Another kind of storage is added here,
beside `local` and `bucket`: `directory` says what it must do, and `catalog` opens it. Then look at every call of
`paths.is_local`.
"""
