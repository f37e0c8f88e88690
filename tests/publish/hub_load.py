"""Loads encoders by their names on the Hub, with whatever transformers this Python has; nothing of ours is imported.

`python hub_load.py NAME ...` prints, for each, the classes of two doors and their largest difference to the golden
features.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

made = {}
for name in sys.argv[1:]:
    native, info = AutoModel.from_pretrained(name, output_loading_info=True)
    remote = AutoModel.from_pretrained(name, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(name)
    golden = load_file(hf_hub_download(name, "golden.safetensors"))
    layer = native.config.pivot["feature_layer"]
    with torch.no_grad():
        seen = native.eval()(golden["pixel_values"], output_hidden_states=True).hidden_states[layer]
        ours = remote(golden["pixel_values"]).last_hidden_state
    made[name] = {
        "keys": sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]),
        "classes": [type(native).__name__, type(remote).__name__, type(processor).__name__],
        "difference": max((m - golden["last_hidden_state"]).abs().max().item() for m in (seen, ours)),
    }
print(json.dumps({"transformers": transformers.__version__, "loaded": made}))
