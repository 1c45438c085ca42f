"""docs/deploy: linted, and its flags, ports, paths and times those of the code."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from raee_serve.engine.compat import SUPPORTED_VLLM
from raee_serve.server import launch
from raee_serve.server.readiness import READY
from raee_serve.server.settings import DepthSettings
from raee_serve.server.vllm_server import parse_serve_args
from tests.unit.test_server_metrics import metrics_in, our_metrics

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
UNIT = DEPLOY / "raee-serve.service"
ALIVE = "/health"


def compose():
    """The services, `${NAME:?why}` and `${NAME:-default}` filled in."""
    text = (DEPLOY / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+)(:[?-][^}]*)?\}", r"\1", text))


def manifests():
    """Of kubernetes.md, by kind and name."""
    blocks = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "kubernetes.md").read_text(), re.DOTALL)
    documents = [one for block in blocks for one in yaml.safe_load_all(block)]
    return {(one["kind"], one["metadata"]["name"]): one for one in documents}


def pod():
    return manifests()["Deployment", "raee-serve"]["spec"]["template"]["spec"]


def unit():
    """The unit's settings, continued lines joined; of one given twice the last."""
    lines = UNIT.read_text().replace("\\\n", " ").splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))


def seconds(text):
    return int(re.fullmatch(r"(\d+)s?", str(text))[1])


COMMANDS = {
    "compose": compose()["services"]["server"]["command"],
    "kubernetes": pod()["containers"][0]["args"],
    "systemd": shlex.split(unit()["ExecStart"])[1:],
}
STOP_TIMES = {
    "compose": seconds(compose()["services"]["server"]["stop_grace_period"]),
    "kubernetes": seconds(pod()["terminationGracePeriodSeconds"])
    - pod()["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"],
    "systemd": seconds(unit()["TimeoutStopSec"]),
}


def parsed(command):
    """(our flags, vLLM's) of a `serve` command, as `raee-serve` takes it."""
    assert command[0] == "serve"
    parser = argparse.ArgumentParser(allow_abbrev=False)
    launch.add_arguments(parser)
    ours, rest = parser.parse_known_args(command[1:])
    return ours, parse_serve_args(rest)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_one_that_serve_takes(name):
    ours, vllms = parsed(COMMANDS[name])
    assert DepthSettings(table=ours.table, watch_table=ours.watch_table).table
    assert vllms.model_tag and vllms.port == 8000
    quiet = set(vllms.disable_access_log_for_endpoints.split(","))
    assert quiet == {ALIVE, READY, "/metrics"}


@pytest.mark.parametrize("name", COMMANDS)
def test_who_stops_it_waits_longer_than_the_requests_may_take(name):
    _, vllms = parsed(COMMANDS[name])
    assert 0 < vllms.shutdown_timeout <= STOP_TIMES[name] - 10


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfiles_pass_hadolint(file):
    hadolint = Path(sys.prefix) / "tools" / "bin" / "hadolint"
    if not hadolint.exists():
        pytest.skip(f"no {hadolint} (make test installs it)")
    done = subprocess.run([str(hadolint), str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_are_pinned_run_as_nobody_and_can_be_probed(file):
    text = file.read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert all(re.search(r":v?\d+\.\d+\.\d+", base) for base in bases)
    assert re.findall(r"^USER (.+)", text, re.MULTILINE)[-1] == "10001"
    assert re.findall(r"^EXPOSE (.+)", text, re.MULTILINE) == ["8000"]
    assert f"http://127.0.0.1:8000{ALIVE}" in text.split("HEALTHCHECK")[1]
    assert 'ENTRYPOINT ["raee-serve"]' in text and "\nSTOPSIGNAL SIGTERM\n" in text


def test_the_cuda_image_is_of_the_vllm_that_is_supported():
    assert f"vllm/vllm-openai:v{SUPPORTED_VLLM}" in (DEPLOY / "Dockerfile.cuda").read_text()


def test_the_images_get_what_the_package_is_built_from():
    ignored, *rules = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"
    ]
    assert ignored == "*"
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert all((ROOT / name).exists() for name in sent)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    packages = project["tool"]["setuptools"]["packages"]
    folders = project["tool"]["setuptools"]["package-dir"]
    needed |= {folders.get(name, name).split(".")[0] for name in packages}
    assert needed == sent
    assert not any(fnmatch("raee_serve/cli.py", rule) for rule in rules if rule[0] != "!")


def test_compose_mounts_what_is_there_and_names_each_volume():
    stack = compose()
    for service in stack["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), source
            else:
                assert source in stack["volumes"] or source == "TABLE"
        image = service["image"]
        assert image == "raee-serve:cpu" or re.search(r":v?\d+\.\d+\.\d+$", image)
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    build = stack["services"]["server"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]) in DOCKERFILES


def test_prometheus_asks_the_server_and_grafana_asks_prometheus():
    services = compose()["services"]
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["server:8000"]}] and "server" in services
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasources.yaml").read_text())["datasources"]
    port = services["prometheus"]["ports"][0].split(":")[-1]
    assert (source["type"], source["url"]) == ("prometheus", f"http://prometheus:{port}")
    (provider,) = yaml.safe_load((DEPLOY / "grafana/dashboards.yaml").read_text())["providers"]
    mounted = [mount.split(":")[1] for mount in services["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/raee-serve.json" in mounted


def test_kubernetes_asks_the_right_probe_for_each_purpose():
    container = pod()["containers"][0]
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness")}
    assert {probe["path"] for probe in asked.values()} == {READY}
    assert container["livenessProbe"]["httpGet"]["path"] == ALIVE
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod()["volumes"]}


def test_the_router_finds_the_pods():
    labels = manifests()["Deployment", "raee-serve"]["spec"]["template"]["metadata"]["labels"]
    router = manifests()["Deployment", "vllm-router"]["spec"]["template"]["spec"]["containers"][0]
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in router["args"])
    assert dict([flags["k8s-label-selector"].split("=")]) == labels
    assert flags["k8s-port"] == "8000"
    assert manifests()["Service", "raee-serve"]["spec"]["selector"] == labels


@pytest.fixture
def runnable_unit(tmp_path):
    """The unit with a command that exists on this machine."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = UNIT.read_text().replace("/opt/raee-serve/bin/raee-serve", sys.executable)
    file = tmp_path / UNIT.name
    file.write_text(text)
    return file


def test_systemd_takes_the_unit(runnable_unit):
    command = ["systemd-analyze", "verify", "--man=no", str(runnable_unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # Units of the machine itself may be faulty; ours must not be.
    assert "raee-serve.service" not in done.stderr, done.stderr


def test_systemd_finds_the_unit_hardened(runnable_unit):
    """An exposure of at most 2 of 10."""
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager"]
    done = subprocess.run([*command, str(runnable_unit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_the_unit_restarts_and_stops_as_the_documents_say():
    settings = unit()
    assert settings["Restart"] == "on-failure" and settings["KillSignal"] == "SIGTERM"
    assert settings["NoNewPrivileges"] == "yes" and settings["ProtectSystem"] == "strict"


def test_the_documents_name_metrics_and_files_that_exist():
    for page in DEPLOY.glob("*.md"):
        text = page.read_text()
        named = {name for name in metrics_in(text) if name.startswith("raee_") and "_" in name[5:]}
        assert named <= our_metrics()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (DEPLOY / link).exists(), link
