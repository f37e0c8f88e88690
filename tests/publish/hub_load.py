"""Load encoders by their names on the Hub, with any transformers; nothing of this package is imported.

`python hub_load.py NAME ...` prints the classes of both loading paths for each encoder, and the largest difference of
their features from the golden ones.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

loaded = {}
for name in sys.argv[1:]:
    native, info = AutoModel.from_pretrained(name, output_loading_info=True)
    remote = AutoModel.from_pretrained(name, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(name)
    golden = load_file(hf_hub_download(name, "golden.safetensors"))
    layer = native.config.pivot["feature_layer"]
    with torch.no_grad():
        native_features = native.eval()(golden["pixel_values"], output_hidden_states=True).hidden_states[layer]
        remote_features = remote(golden["pixel_values"]).last_hidden_state
    differences = [features - golden["last_hidden_state"] for features in (native_features, remote_features)]
    loaded[name] = {
        "keys": sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]),
        "classes": [type(native).__name__, type(remote).__name__, type(processor).__name__],
        "difference": max(difference.abs().max().item() for difference in differences),
    }
print(json.dumps({"transformers": transformers.__version__, "loaded": loaded}))
