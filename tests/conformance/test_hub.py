"""Published encoders loaded by name with older software, and the local Hub server used by older clients."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conformance.environment import ROOT, make_environment, make_overlay
from tests.conformance.test_loading_paths import DEPENDENCIES, TRANSFORMERS
from tests.publish.hub_server import hub_server
from tests.publish.publishable import PROSE, make_publishable

NAME = "pivot/siglip2-so400m"
OLDEST_CLIENT = next(d.partition(">=")[2] for d in DEPENDENCIES if d.startswith("huggingface_hub")) + ".0"


@pytest.mark.conformance
@pytest.mark.parametrize("software", ["transformers-4", "transformers-5-newest"])
def test_a_pushed_encoder_loads_by_name_with_an_empty_cache(software: str, tmp_path: Path) -> None:
    encoder = make_publishable(tmp_path / "tiny-dpo")
    prose, script = tmp_path / "prose.yaml", tmp_path / "load.py"
    prose.write_text(yaml.safe_dump(PROSE))
    shutil.copyfile(ROOT / "tests" / "publish" / "hub_load.py", script)
    python = make_environment(software, *TRANSFORMERS[software])
    with hub_server(tmp_path / "hub") as server:
        push = [sys.executable, "-m", "pivot_hub", "push", str(encoder), NAME, "--yes", "--prose", str(prose)]
        subprocess.run(push, env=server.environment(tmp_path / "home"), check=True)
        environment = server.environment(tmp_path / "empty") | {"PYTHONPATH": ""}
        command = [str(python), str(script), NAME]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout.splitlines()[-1])
    print(software, output)
    assert output["loaded"][NAME]["keys"] == []
    assert output["loaded"][NAME]["classes"][:2] == ["SiglipVisionModel", "PivotVisionModel"]
    assert output["loaded"][NAME]["difference"] < 1e-5


@pytest.mark.conformance
def test_the_oldest_supported_client_can_send_all_its_requests(tmp_path: Path) -> None:
    """The requests of `tests/local_server/test_local_server.py`, which uses the installed client."""
    overlay = make_overlay("huggingface-hub-oldest", f"huggingface_hub=={OLDEST_CLIENT}")
    with hub_server(tmp_path / "hub", part_bytes=1_000_000) as server:
        environment = server.environment(tmp_path / "home") | {"READER": server.tokens["bob"]}
        command = [sys.executable, str(ROOT / "tests" / "publish" / "hub_calls.py")]
        environment["PYTHONPATH"] = str(overlay)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == OLDEST_CLIENT
