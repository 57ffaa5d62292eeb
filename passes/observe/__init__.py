"""Statistics of the observed tensors, and the ranges chosen from them."""
