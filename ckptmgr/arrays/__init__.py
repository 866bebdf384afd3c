"""Arrays: from the devices to the host, to chunks in a database, and back. Knows leaves and files, no steps."""
