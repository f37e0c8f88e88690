"""Probes: measurements of a frozen encoder, each with the conditions that it was measured under."""
