"""MLLMs: build them, load them, choose what trains, and take their encoder out."""
