"""Loops that numba compiles, by what they are for; kernels.py tells what each does."""
