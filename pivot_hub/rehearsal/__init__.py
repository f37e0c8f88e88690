"""Rehearsal of the CUDA path without a GPU: the project's own code runs on fake CUDA tensors, which hold no numbers.

This package imports nothing: `library.load` has to run before torch is imported.
"""
