"""The only rooms that know Orbax and TensorStore."""
