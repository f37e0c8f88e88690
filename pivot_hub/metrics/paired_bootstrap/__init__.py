"""paired_bootstrap: evaluate module and Hub Space in one folder."""
