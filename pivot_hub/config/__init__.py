"""Config: recipes and the YAML files that they and other settings are read from."""
