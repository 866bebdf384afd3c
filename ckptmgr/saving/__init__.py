"""A save: decide, copy, hand over; then, on the one thread behind it: write, seal, publish, mirror, retain."""
