"""A Hub on this machine: the protocol that huggingface_hub speaks, over loopback, with its repositories in a folder."""
