"""paired_bootstrap: a folder that is an evaluate module and a Hub Space."""
