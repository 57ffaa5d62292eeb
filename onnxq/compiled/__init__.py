"""Loops that numba compiles, by what they are for; kernels.py tells what each does.

numba caches what it compiled of a file until that file changes. Where code of another file is compiled into it, the file has
a hash of that one, so that it changes with it; a test tells the hash.
"""
