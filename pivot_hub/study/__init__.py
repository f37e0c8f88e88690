"""Studies: a grid of recipes over seeds and factors, trained and measured, and reported from one table."""
