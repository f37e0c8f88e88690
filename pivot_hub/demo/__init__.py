"""The Space's work behind its page: two MLLMs, what they answer and see, and the panels that show it."""
