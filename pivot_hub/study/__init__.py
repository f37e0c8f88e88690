"""Studies: a grid of recipes over seeds and factors, trained, measured, and reported from one table."""
