"""The Space's work behind its page: two MLLMs are compared on one image, and panels show the results."""
