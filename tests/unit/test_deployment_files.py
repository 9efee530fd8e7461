"""The files in docker/: valid by the schemas of Compose and Kubernetes, and in step with what this orchestra reads.

Nothing is pulled, built or asked of a network: the schemas come with kubernetes-validate and check-jsonschema.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from orchestra.cli.main import cli
from orchestra.cli.session import Session
from orchestra.config import Config, load_config
from orchestra.config_cluster import split_address

DOCKER = Path(__file__).resolve().parents[2] / "docker"
KUBERNETES = DOCKER / "kubernetes"
SETTINGS = {"compose": DOCKER / "orchestra.toml", "kubernetes": KUBERNETES / "orchestra.toml"}
POD_IP = "10.1.2.3"
FIELDS = {"status.podIP": POD_IP, "spec.nodeName": "machine-7.example.com"}


@cache
def document(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text())
    assert isinstance(loaded, dict), path
    return loaded


def kustomization() -> dict[str, Any]:
    return document(KUBERNETES / "kustomization.yaml")


def manifests() -> dict[str, dict[str, Any]]:
    """Every manifest by its file's name."""
    return {path.name: document(path) for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml"}


def daemonset_pod() -> dict[str, Any]:
    return dict(manifests()["daemonset.yaml"]["spec"]["template"]["spec"])


def services() -> dict[str, dict[str, Any]]:
    return dict(document(DOCKER / "compose.yaml")["services"])


def container(pod: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in [*pod["containers"], *pod.get("initContainers", ())] if one["name"] == name)


def mounts_of(one: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A container's volume mounts by the volume's name."""
    return {mount["name"]: mount for mount in one["volumeMounts"]}


def kubernetes_environment(one: Mapping[str, Any]) -> dict[str, str]:
    """What a container of Kubernetes finds set, with `$(POD_IP)` replaced as the kubelet does."""
    values = {
        entry["name"]: entry["value"] if "value" in entry else FIELDS[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in one.get("env", ())
    }
    return {name: value.replace("$(POD_IP)", values["POD_IP"]) for name, value in values.items()}


def settings(which: str, environment: Mapping[str, str]) -> Config:
    """What our loader makes of a file of docker/ in such an environment (whose ORCHESTRA_CONFIG is the container's)."""
    return load_config(SETTINGS[which], {k: v for k, v in environment.items() if k != "ORCHESTRA_CONFIG"})


# -- schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(manifests()))
def test_every_manifest_is_valid(name: str) -> None:
    """Strictly: an unknown or misspelt field fails, too."""
    version = kubernetes_validate.latest_version()
    assert kubernetes_validate.validate(manifests()[name], version, strict=True)


def test_a_misspelt_field_of_a_manifest_is_found() -> None:
    """The check above can fail: it knows fields deep inside a pod."""
    wrong = json.loads(json.dumps(manifests()["daemonset.yaml"]))
    mount = wrong["spec"]["template"]["spec"]["containers"][1]["volumeMounts"][0]
    mount["mountPropogation"] = "Bidirectional"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_the_compose_file_is_valid() -> None:
    """By the Compose specification; a service with an unknown key is not."""
    text = (resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text()
    validator = jsonschema.validators.validator_for(json.loads(text))(json.loads(text))
    compose = document(DOCKER / "compose.yaml")
    assert [error.message for error in validator.iter_errors(compose)] == []
    wrong = {**compose, "services": {"node": {"image": "x", "helthcheck": {}}}}
    assert list(validator.iter_errors(wrong))


def test_the_kustomization_names_files_that_are_there_and_all_but_the_job() -> None:
    """A manifest that nobody applies would be one that nobody reads."""
    listed = set(kustomization()["resources"])
    assert listed == set(manifests()) - {"training-job.yaml"}
    for generator in kustomization()["configMapGenerator"]:
        assert all((KUBERNETES / name).is_file() for name in generator["files"])


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["node", "mount"])
def test_the_settings_of_a_pod_are_ours(name: str) -> None:
    """File and environment of each container go through our loader: every key is known, every value allowed."""
    pod = daemonset_pod()
    config = settings("kubernetes", kubernetes_environment(container(pod, name)))
    assert config.cluster is not None
    assert (config.cluster.listen, config.cluster.node_id) == (f"{POD_IP}:7420", "machine-7.example.com")
    assert not config.daemon.autostart, "the kubelet starts the daemon"
    where = mounts_of(container(pod, name))
    assert where["cache"]["mountPath"] == str(config.cache.dir)


@pytest.mark.parametrize("name", ["node-1", "node-2", "node-3", "trainer"])
def test_the_settings_of_a_compose_service_are_ours(name: str) -> None:
    """The same for the containers of compose.yaml, whose volumes are where the file says."""
    service = services()[name]
    config = settings("compose", service["environment"])
    assert config.cluster is not None
    assert any(volume.split(":")[1] == str(config.cache.dir) for volume in service["volumes"])
    assert service["environment"]["ORCHESTRA_CONFIG"] == service["configs"][0]["target"]
    host, port = split_address(config.cluster.listen)
    assert (host, port) == (name if name != "trainer" else "node-1", 7420)
    assert services()[host]["hostname"] == host


def test_a_misspelt_variable_of_a_container_is_found() -> None:
    """The two tests above can fail: our loader refuses what it does not know."""
    environment = kubernetes_environment(container(daemonset_pod(), "node"))
    with pytest.raises(Exception, match="ORCHESTRA_CLUSTER_LISTENS"):
        settings("kubernetes", {**environment, "ORCHESTRA_CLUSTER_LISTENS": "x:1"})


def test_the_image_sets_only_variables_that_we_read() -> None:
    """ENV of the Dockerfile goes through our loader, and names the folder that the image makes."""
    text = (DOCKER / "Dockerfile").read_text()
    environment = dict(re.findall(r"(ORCHESTRA_[A-Z_]+)=(\S+)", text))
    config = load_config(SETTINGS["compose"], {**environment, "ORCHESTRA_CLUSTER_LISTEN": "node-1:7420"})
    assert str(config.cache.dir) in re.findall(r"install -d -o orchestra .*", text)[0]


def test_the_secret_is_where_the_settings_say_and_in_no_file() -> None:
    """Kubernetes: only the daemon's container has it. Compose: the nodes read it, one service writes it."""
    pod = daemonset_pod()
    cluster = settings("kubernetes", kubernetes_environment(container(pod, "node"))).cluster
    assert cluster is not None and cluster.secret_file is not None
    assert mounts_of(container(pod, "node"))["secret"]["mountPath"] == str(cluster.secret_file.parent)
    assert "secret" not in mounts_of(container(pod, "mount"))
    volume = next(one for one in pod["volumes"] if one["name"] == "secret")
    assert volume["secret"]["defaultMode"] == 0o400
    cluster = settings("compose", services()["node-1"]["environment"]).cluster
    assert cluster is not None and cluster.secret_file is not None
    folder = str(cluster.secret_file.parent)
    with_it = {name for name, one in services().items() if any(folder in volume for volume in one.get("volumes", ()))}
    assert with_it == {"secret", "node-1", "node-2", "node-3"}
    assert str(cluster.secret_file) in services()["secret"]["command"][0]
    for path in DOCKER.rglob("*.yaml"):
        assert "kind: Secret\n" not in path.read_text(), path


# -- commands --------------------------------------------------------------------------------------------------------


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command line of orchestra in docker/, without the program's name; where it stands."""
    pod = daemonset_pod()
    for one in pod["containers"]:
        yield f"daemonset {one['name']}", list(one["args"])
        hooks = [hook["exec"]["command"] for hook in one.get("lifecycle", {}).values()]
        yield from ((f"daemonset {one['name']} hook", words[1:]) for words in hooks if words[0] == "orchestra")
    for name, service in services().items():
        if service["image"] == "orchestra-node" and "entrypoint" not in service:
            yield f"compose {name}", list(service.get("command", default_command()))
        for text in service.get("command", ()):
            for line in text.splitlines():
                if line.strip().startswith("orchestra "):
                    yield f"compose {name}", shlex.split(line)[1:]


def documented_command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command line of orchestra in the code blocks of docs/kubernetes.md."""
    text = (DOCKER.parent / "docs" / "kubernetes.md").read_text()
    for block in text.split("```")[1::2]:
        for words in map(shlex.split, block.replace("\\\n", " ").splitlines()):
            if "exec" in words:
                yield f"docs {' '.join(words)}", words[len(words) - words[::-1].index("orchestra") :]


def default_command() -> list[str]:
    """CMD of the Dockerfile, which goes behind its ENTRYPOINT, `orchestra`."""
    text = (DOCKER / "Dockerfile").read_text()
    assert re.search(r'^ENTRYPOINT \["tini", "--", "orchestra"\]$', text, re.MULTILINE)
    return list(ast.literal_eval(re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)[0]))


def parse(words: list[str]) -> click.Command:
    """Let our own command line parse `words` and return the command that would run. Raises click's UsageError."""
    command: click.Command = cli
    context = cli.make_context("orchestra", list(words), obj=Session())
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None and name is not None
        command, context = found, found.make_context(name, rest, parent=context)
    return command


def test_every_command_line_is_one_of_ours() -> None:
    """Verbs and options of all containers and hooks are parsed by our command line; a wrong option is refused."""
    found = {where: parse(words).name for where, words in command_lines()}
    assert found["daemonset node"] == found["compose node-3"] == "run"
    assert found["daemonset mount"] == "mount"
    assert found["daemonset mount hook"] == found["compose trainer"] == "umount"
    documented = [parse(words).name for _, words in documented_command_lines()]
    assert documented == ["ls", "ls"]
    with pytest.raises(click.UsageError):
        parse(["fuse", "mount", "--allow-others", "/", "/mnt"])


# -- how the parts fit -----------------------------------------------------------------------------------------------


def test_the_service_finds_the_pods_at_the_port_that_they_listen_at() -> None:
    """Name, namespace, selector and port of the headless service are those of settings and pods."""
    service, daemonset = manifests()["service.yaml"], manifests()["daemonset.yaml"]
    cluster = settings("kubernetes", kubernetes_environment(container(daemonset_pod(), "node"))).cluster
    assert cluster is not None
    assert cluster.name == f"{service['metadata']['name']}.{kustomization()['namespace']}.svc"
    assert service["spec"]["clusterIP"] == "None"
    labels = daemonset["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert daemonset["spec"]["selector"]["matchLabels"].items() <= labels.items()
    policy = manifests()["networkpolicy.yaml"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    port = split_address(cluster.listen)[1]
    ports = [service["spec"]["ports"][0]["port"], policy["ingress"][0]["ports"][0]["port"]]
    assert [*ports, container(daemonset_pod(), "node")["ports"][0]["containerPort"]] == [port] * 3


def test_a_mount_made_after_the_training_pod_started_is_seen_by_it() -> None:
    """The mount goes into a folder of the shared volume, upwards to the host and downwards into the job."""
    pod = daemonset_pod()
    inside = mounts_of(container(pod, "mount"))["mnt"]
    assert inside["mountPropagation"] == "Bidirectional"
    assert container(pod, "mount")["securityContext"]["privileged"], "Kubernetes asks it of Bidirectional"
    target = container(pod, "mount")["args"][-1]
    assert Path(target).parent == Path(inside["mountPath"])
    job = manifests()["training-job.yaml"]["spec"]["template"]["spec"]
    for name in ("wait-for-the-folder", "train"):
        seen = mounts_of(container(job, name))["orchestra"]
        assert (seen["mountPropagation"], seen["mountPath"]) == ("HostToContainer", inside["mountPath"])
        assert any(target in word for word in container(job, name)["command"])
    host = {one["name"]: one.get("hostPath", {}).get("path") for one in [*pod["volumes"], *job["volumes"]]}
    assert host["mnt"] == host["orchestra"]


def test_only_the_mount_is_privileged_and_nothing_asks_the_api_server() -> None:
    """Every other container has no capability, no way to more rights and a root file system that it cannot change."""
    pods = [daemonset_pod(), manifests()["training-job.yaml"]["spec"]["template"]["spec"]]
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        for one in [*pod["containers"], *pod["initContainers"]]:
            context = one["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert "memory" in one["resources"]["limits"]
            if one["name"] != "mount":
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}
    assert not any(document["kind"] in ("Role", "ClusterRole", "RoleBinding") for document in manifests().values())


def test_images_are_pinned() -> None:
    """No image is `latest` or without a version, apart from the two that this repository builds."""
    built = {"orchestra-node", "orchestra-trainer"}
    assert {one["name"] for one in kustomization()["images"]} <= built
    named = [service["image"] for service in services().values()]
    named += [one["image"] for one in manifests()["training-job.yaml"]["spec"]["template"]["spec"]["containers"]]
    named += [f"{one['newName']}:{one['newTag']}" for one in kustomization()["images"]]
    named += re.findall(r"^ARG PYTHON_IMAGE=(\S+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    for image in set(named) - built:
        assert re.search(r":v?\d+\.\d+\.\d+", image), image
