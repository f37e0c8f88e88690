"""Data: files and the built-in world, as rows that TRL's trainers read."""
