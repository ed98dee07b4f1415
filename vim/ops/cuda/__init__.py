"""CUDA C++ backends: `kernels/cuda/<op>.cu`, compiled at first use; see `_compile`.

Importing this package compiles nothing and needs no GPU.
"""
