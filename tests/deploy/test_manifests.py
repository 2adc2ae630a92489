"""Compose and the Helm chart: what they make is valid, hardened, and has no secret in it."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from chart_rendering import Chart

from fedsecure.aggregator.step_worker import MAX_BYTES

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"
CHART = ROOT / "deploy" / "helm" / "fedsecure"
FEDERATION = 'listen = "0.0.0.0:8443"\nidentity = "/var/lib/fedsecure/identity"\n'
GIVEN = {"federation": FEDERATION, "identity": {"existingSecret": "keys"}}
EVERYTHING = {
    **GIVEN,
    "database": {"existingSecret": "database"},
    "enrolment": {"enabled": True},
    "imagePullSecrets": [{"name": "registry"}],
    "persistence": {"size": "5Gi", "storageClass": "fast"},
    "networkPolicy": {"siteCidrs": ["192.0.2.0/24"], "databaseCidrs": ["198.51.100.7/32"]},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "nodeSelector": {"disk": "ssd"},
}


def merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = dict(values)
    for key, value in more.items():
        both[key] = (
            merged(values[key], value) if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        )
    return both


def values(more: dict[str, Any]) -> dict[str, Any]:
    return merged(yaml.safe_load((CHART / "values.yaml").read_text()), more)


def rendered(more: dict[str, Any]) -> list[dict[str, Any]]:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    release = {"Name": "brain", "Namespace": "fed", "Service": "Helm"}
    chart = Chart({"Values": values(more), "Release": release, "Chart": {"AppVersion": about["appVersion"]}})
    chart.render((CHART / "templates" / "_names.tpl").read_text())
    found = []
    for file in sorted((CHART / "templates").glob("*.yaml")):
        found += [document for document in yaml.safe_load_all(chart.render(file.read_text())) if document]
    assert "brain-aggregator-0" in chart.render((CHART / "templates" / "NOTES.txt").read_text())
    return found


def of_kind(kind: str, more: dict[str, Any]) -> dict[str, Any]:
    (one,) = [document for document in rendered(more) if document["kind"] == kind]
    return one


# --- the chart ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [GIVEN, EVERYTHING], ids=["least", "everything"])
def test_what_the_chart_makes_is_valid_and_of_one_release(more: dict[str, Any]) -> None:
    documents = rendered(more)
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(set(names)) == len(names)
    expected = {"ConfigMap", "Service", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget"}
    assert {kind for kind, _ in names} == expected | ({"ServiceMonitor"} if more is EVERYTHING else set())
    for document in documents:
        assert document["apiVersion"]
        assert document["metadata"]["labels"]["app.kubernetes.io/instance"] == "brain"
    pod = of_kind("StatefulSet", more)["spec"]["template"]
    for document in documents:
        selector = document["spec"].get("selector", {}) if "spec" in document else {}
        wanted = selector.get("matchLabels", selector)
        if document["kind"] != "ServiceMonitor":
            assert wanted.items() <= pod["metadata"]["labels"].items()
    config = of_kind("ConfigMap", more)
    assert config["data"]["federation.toml"] == FEDERATION


def test_the_pod_is_one_not_root_and_writes_nowhere_else() -> None:
    spec = of_kind("StatefulSet", EVERYTHING)["spec"]
    assert spec["replicas"] == 1
    pod = spec["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    for container in [*pod["initContainers"], *pod["containers"]]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert not container["image"].endswith(":latest")
    (main,) = pod["containers"]
    paths = {name: main[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert secret == {"secretName": "keys", "defaultMode": 0o400}


def test_keys_end_up_where_only_their_owner_reads_them(tmp_path: Path) -> None:
    """The init container's own script, on files that their group can read, as Kubernetes hands them out."""
    (seed,) = of_kind("StatefulSet", GIVEN)["spec"]["template"]["spec"]["initContainers"]
    given, home = tmp_path / "secret", tmp_path / "home"
    given.mkdir()
    home.mkdir()
    for name in ("identity.key", "roster.json"):
        (given / name).write_text(name)
        (given / name).chmod(0o440)
    (script,) = seed["args"]
    script = script.replace("/run/identity", str(given)).replace("/var/lib/fedsecure", str(home))
    for _ in range(2):
        subprocess.run(["/bin/sh", "-euc", script], check=True, timeout=60)
        folder = home / "identity"
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
        assert modes == {"identity": 0o700, "identity.key": 0o600, "roster.json": 0o600}
        # A newer roster stays over restarts, whatever mode the volume gave it.
        assert (folder / "roster.json").read_text() in ("roster.json", "newer")
        (folder / "roster.json").write_text("newer")
        (folder / "roster.json").chmod(0o660)
    assert (home / "identity" / "roster.json").read_text() == "newer"


def test_nothing_goes_out_and_only_sites_and_metrics_come_in() -> None:
    policy = of_kind("NetworkPolicy", GIVEN)["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == ["federation", "metrics"]
    policy = of_kind("NetworkPolicy", EVERYTHING)["spec"]
    assert policy["ingress"][0]["from"] == [{"ipBlock": {"cidr": "192.0.2.0/24"}}]
    assert [port["port"] for port in policy["ingress"][0]["ports"]] == ["federation", "enrolment"]
    assert policy["egress"][0]["to"] == [{"ipBlock": {"cidr": "198.51.100.7/32"}}]


SCHEMA = json.loads((CHART / "values.schema.json").read_text())


@pytest.mark.parametrize("more", [GIVEN, EVERYTHING], ids=["least", "everything"])
def test_values_keep_the_schema_and_the_schema_knows_every_value(more: dict[str, Any]) -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(values(more), SCHEMA)
    assert set(values({})) == set(SCHEMA["properties"]) - {"global"}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"federation": FEDERATION},
        {**GIVEN, "replicas": 2},
        {**GIVEN, "image": {"tag": "latest"}},
        {**GIVEN, "service": {"port": 0}},
        {**GIVEN, "service": {"type": "Ingress"}},
        {**GIVEN, "federation": 'identity = "identity"'},
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values(wrong), SCHEMA)


@pytest.mark.parametrize("text", ["{{ if .Values }}", "{{ end }}", "{{ nothing .Values }}", "{{ .Values.none }}"])
def test_a_template_that_is_wrong_is_noticed(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Chart({"Values": {}}).render(text)


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
def test_helm_has_no_complaint(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(EVERYTHING))
    command = ["helm", "lint", "--strict", str(CHART), "--values", str(tmp_path / "values.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


UNITS = {"m": 1 << 20, "g": 1 << 30, "Mi": 1 << 20, "Gi": 1 << 30}


def size_of(text: str) -> int:
    number, unit = re.findall(r"^(\d+)(\w+)$", text)[0]
    return int(number) * UNITS[unit]


def test_a_pods_tmp_holds_the_largest_state_and_its_memory_holds_both() -> None:
    pod = of_kind("StatefulSet", GIVEN)["spec"]["template"]["spec"]
    (tmp,) = [size_of(volume["emptyDir"]["sizeLimit"]) for volume in pod["volumes"] if volume["name"] == "tmp"]
    assert MAX_BYTES < tmp < size_of(pod["containers"][0]["resources"]["limits"]["memory"])


# --- compose ------------------------------------------------------------------------------------------------------

STACK = yaml.safe_load(COMPOSE.read_text())


@pytest.mark.parametrize("name", STACK["services"])
def test_each_service_is_hardened(name: str) -> None:
    service = STACK["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert re.search(r":v?\d+\.\d+", service["image"]), "a version"
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert not {"privileged", "network_mode", "pid", "devices"} & set(service)
    # The aggregator's own is in its image; a backup ends by itself.
    assert "healthcheck" in service or name in ("aggregator", "backup")
    assert (service["restart"] == "no") == (name == "backup")


def test_the_aggregators_tmp_holds_the_largest_state_and_its_memory_holds_both() -> None:
    service = STACK["services"]["aggregator"]
    (mount,) = service["tmpfs"]
    (tmp,) = [size_of(text) for text in re.findall(r"[:,]size=(\w+)", mount)]
    assert MAX_BYTES < tmp < size_of(service["mem_limit"])


def test_only_the_sites_door_is_open_and_the_database_is_inside() -> None:
    ports = {name: service.get("ports", []) for name, service in STACK["services"].items()}
    assert ports["aggregator"] == ["8443:8443"]
    assert ports["database"] == ports["prometheus"] == []
    assert all(port.startswith("127.0.0.1:") for port in ports["grafana"])
    assert STACK["networks"]["back"]["internal"] is True
    assert STACK["services"]["database"]["networks"] == ["back"]
    profiles = {name: service["profiles"] for name, service in STACK["services"].items() if "profiles" in service}
    assert profiles == {"prometheus": ["watch"], "grafana": ["watch"], "backup": ["tools"]}


def test_a_backup_reaches_what_it_copies_and_nothing_else() -> None:
    backup, aggregator = STACK["services"]["backup"], STACK["services"]["aggregator"]
    assert backup["networks"] == STACK["services"]["database"]["networks"]
    assert set(aggregator["volumes"]) < set(backup["volumes"])
    assert backup["env_file"] == aggregator["env_file"]
    assert backup["build"]["target"] == "tools"
    server = re.match(r"postgres:(\d+)\.", STACK["services"]["database"]["image"])
    recipe = (COMPOSE.parents[1] / "docker" / "Dockerfile").read_text()
    assert server
    assert f"postgresql-client={server[1]}+" in recipe, "pg_dump refuses a server that is newer than itself"


def test_no_secret_stands_in_the_files() -> None:
    for service in STACK["services"].values():
        for key, value in (service.get("environment") or {}).items():
            assert "PASSWORD" not in key or str(value).startswith("/run/secrets/"), key
    assert all(set(secret) == {"file"} for secret in STACK["secrets"].values())
    assert {"database.env", "secrets/", "backups/"} <= set((COMPOSE.parent / ".gitignore").read_text().split())


def test_what_is_named_is_declared() -> None:
    for service in STACK["services"].values():
        assert set(service["networks"]) <= set(STACK["networks"])
        assert set(service.get("secrets", ())) <= set(STACK["secrets"])
        assert set(service.get("depends_on", ())) <= set(STACK["services"])
        named = {volume.split(":")[0] for volume in service.get("volumes", ())}
        assert {name for name in named if not name.startswith(".")} <= set(STACK["volumes"])
