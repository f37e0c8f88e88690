"""A Hub server on this machine: the protocol that huggingface_hub speaks, over loopback, with its state in a folder.

Modules import each other relatively: `pivot quickstart --push-local` loads this folder as a package of its own.
"""
