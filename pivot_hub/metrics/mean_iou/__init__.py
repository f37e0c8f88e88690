"""mean_iou: a folder that is an evaluate module and a Hub Space."""
