"""pointing_accuracy: a folder that is an evaluate module and a Hub Space."""
