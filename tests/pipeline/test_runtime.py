"""The local Ray: where it listens, from where it can be started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import free_port

LISTENING = """
import json, os, sys
import psutil, ray
from ray import serve
from pipeline.runtime import RayConfig, ensure_ray, stop_ray

ensure_ray(RayConfig(num_cpus=2, object_store_memory=80_000_000))

@ray.remote(num_cpus=0, runtime_env={"env_vars": {"AN": "environment"}})  # as Ray Train's actors have one
class Actor:
    def executable(self):
        return sys.executable

executable = ray.get(Actor.remote().executable.remote(), timeout=60)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
ours = [one for child in psutil.Process().children(recursive=True) for one in child.net_connections("tcp")]
addresses = sorted({one.laddr.ip for one in ours if one.status == psutil.CONN_LISTEN})
stop_ray()
print(json.dumps({"executable": executable, "addresses": addresses, "ports": len(ours)}))
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_local_ray_listens_on_loopback_alone_and_works_from_a_folder_with_a_space(tmp_path: Path) -> None:
    environment = tmp_path / "My Projects é" / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "lib").symlink_to(Path(sys.prefix) / "lib")
    (environment / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (environment / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    python = str(environment / "bin" / "python")
    run = subprocess.run(
        [python, "-c", LISTENING, str(free_port())], capture_output=True, text=True, timeout=150, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["executable"] == python
    assert found["ports"] > 5
    assert set(found["addresses"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
