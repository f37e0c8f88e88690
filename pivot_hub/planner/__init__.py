"""Planner: the cost of a stage, computed before it runs."""
