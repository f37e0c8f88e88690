"""The registry: which encoders there are, what is known of each, and which of them fits an MLLM."""
