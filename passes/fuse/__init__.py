"""Several nodes into one that has an integer kernel; float, provably equal."""
