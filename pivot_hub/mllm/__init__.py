"""MLLMs: build and load them, choose what is trained, and extract their encoder."""
