"""Benchmarks: two things compared in one run, as a ratio, because timings on shared machines wander."""
