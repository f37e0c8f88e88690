"""energy_inside: evaluate module and Hub Space in one folder."""
