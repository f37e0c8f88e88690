"""mean_iou: evaluate module and Hub Space in one folder."""
