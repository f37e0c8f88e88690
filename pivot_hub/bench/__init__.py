"""Benchmarks: each compares alternatives within one run and reports ratios, because shared machines vary in speed."""
