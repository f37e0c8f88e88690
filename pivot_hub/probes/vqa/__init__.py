"""VQA: questions on the synthetic Shapes dataset, and the 16 benchmarks of the paper through lmms-eval."""
