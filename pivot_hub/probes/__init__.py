"""Probes: measurements of a frozen encoder, each with the conditions it was made under."""
