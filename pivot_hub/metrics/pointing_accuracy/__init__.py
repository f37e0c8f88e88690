"""pointing_accuracy: evaluate module and Hub Space in one folder."""
