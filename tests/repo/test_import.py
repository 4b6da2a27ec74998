"""``import tinylora_lite``: silent, quick, without network, and without what only extras bring."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the import opened a socket")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
sys.path.insert(0, sys.argv[1])
import tinylora_lite as tl

missing = [name for name in tl.__all__ if not hasattr(tl, name)]
seconds = os.times().user + os.times().system
print(json.dumps({"modules": sorted(sys.modules), "missing": missing, "seconds": seconds}))
"""


def test_import():
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["missing"] == []
    loaded = {name.partition(".")[0] for name in found["modules"]}
    extras = {"trl", "peft", "vllm", "datasets", "matplotlib", "scipy", "ipywidgets", "accelerate", "pandas"}
    assert loaded & extras == set()
    assert [name for name in found["modules"] if name.startswith("tinylora_lite.nano")] == []
    assert "transformers.modeling_utils" not in found["modules"]
    assert found["seconds"] < 10, "of the processor, so that a busy machine does not count"
