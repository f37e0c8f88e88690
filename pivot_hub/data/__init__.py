"""Data: files and the synthetic Shapes dataset, as rows that TRL's trainers read."""
