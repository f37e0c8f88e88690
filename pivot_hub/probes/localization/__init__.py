"""Localisation probes: gradient maps scored against boxes and masks."""
