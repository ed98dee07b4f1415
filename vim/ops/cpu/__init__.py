"""Backend "cpu": C++ kernels for x86-64 (AVX-512, AVX2) and, plainer, any other processor.

The sources are in ``kernels/cpu``; setup.py compiles them into this folder.
"""
