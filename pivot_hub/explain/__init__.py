"""Explanations: saliency maps and patch features of an encoder inside its MLLM, and figures of them."""
