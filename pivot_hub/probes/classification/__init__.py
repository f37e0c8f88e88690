"""Classification probes on frozen features."""
