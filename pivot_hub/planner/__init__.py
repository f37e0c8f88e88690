"""Planner: what a stage will cost, before it runs."""
