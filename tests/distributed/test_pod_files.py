"""Scripts and manifests of `tpu/`: they parse, agree with the library, and quote what they pass on."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from jaxft.distributed.link import FAILED, PROCESS_LOST

TPU = Path(__file__).parents[2] / "tpu"
SCRIPTS = sorted([*TPU.glob("*.sh"), *TPU.glob("*.sbatch")])


def test_every_file_is_in_the_readme():
    text = (TPU / "README.md").read_text()
    files = [file.name for file in TPU.iterdir() if file.name != "README.md"]
    assert len(files) >= 7 and [name for name in files if f"`{name}`" not in text] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_errors(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and ("set -euo pipefail" in text or "set -uo pipefail" in text)


@pytest.mark.parametrize("manifest", ["jobset.yaml", "gpu-jobset.yaml"])
def test_manifests(manifest):
    (document,) = yaml.safe_load_all((TPU / manifest).read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = document["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"][:2] == ["jaxft", "train"] and (TPU.parent / container["command"][2]).is_file()
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [FAILED] and rule["onExitCodes"]["containerName"] == container["name"]
    assert document["spec"]["failurePolicy"]["maxRestarts"] > 0 and PROCESS_LOST != FAILED
    if manifest == "gpu-jobset.yaml":
        env = {entry["name"]: entry for entry in container["env"]}
        name = f"{document['metadata']['name']}-{job['name']}-0-0.{document['metadata']['name']}"
        port = container["ports"][0]["containerPort"]
        assert env["JAX_COORDINATOR_ADDRESS"]["value"] == f"{name}:{port}"
        assert env["JAX_NUM_PROCESSES"]["value"] == str(spec["parallelism"])


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def until(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.read_text()


def test_a_launch_passes_every_word_on_and_keeps_the_exit_code(tmp_path):
    """`gcloud ... ssh --command` runs the command here, in a home directory that looks like a machine's."""
    home = tmp_path / "home"
    executable(tmp_path / "bin" / "gcloud",
               f'for word; do case $word in --command=*) cd {home} && HOME={home} bash -c "${{word#--command=}}";; '
               'describe) echo ACTIVE;; esac; done')  # fmt: skip
    executable(home / "jaxft-env" / "bin" / "jaxft", 'printf "%s\\n" "$@" > $HOME/words; exit 75')
    (home / "jaxft").mkdir()
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NAME": "run", "ZONE": "z", "BUCKET": "gs://b"}
    chain = "method=[{name: lora, rank: 8}, {name: hft}]"
    subprocess.run([TPU / "vm.sh", "launch", "configs/a b.yaml", chain], env=environment, check=True, timeout=30)
    assert until(home / "jaxft.exit") == f"{PROCESS_LOST}\n"
    words = (home / "words").read_text().splitlines()
    assert words == ["train", "configs/a b.yaml", chain, f"output={home}/run", "checkpoint.directory=gs://b/run"]
    shown = subprocess.run([TPU / "vm.sh", "status"], env=environment, check=True, capture_output=True, text=True)
    assert "machines: ACTIVE" in shown.stdout and "ended with 75" in shown.stdout


def test_machines_by_ssh_get_their_numbers(tmp_path):
    executable(tmp_path / "bin" / "ssh", 'cd "$(dirname "$0")/.." && bash -c "$2"')
    executable(tmp_path / ".venv" / "bin" / "jaxft", 'printf "%s " "$@" > "words-${!#}"')
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOSTS": "a b", "DIRECTORY": str(tmp_path)}
    subprocess.run([TPU / "nodes.sh", "launch", "x.yaml"], env=environment, check=True, timeout=30)
    for number in range(2):
        words = until(tmp_path / f"words-{number}")
        assert words == f"train x.yaml --coordinator a:8476 --processes 2 --process-id {number} "
