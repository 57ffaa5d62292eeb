"""Which tensors carry which spec, for a target."""
