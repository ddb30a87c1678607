"""The manifests of docs/deploy, offline: fields that the resource definitions have, and what they say of longctx.

FIELDS is the part of KubeRay's v1 types (RayCluster, RayJob, RayService; 1.5.1 and later) and of Kubernetes' pods that
the manifests may use: a name, its type, with ``!`` if it is required. A misspelt field, which a cluster would drop
or refuse, is found here; what a controller makes of right ones is not.
"""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ServeConfig
from cluster.resources import Node, share_resources
from cluster.room import Bundle, find_shortage
from longctx.cli.command_line import parse
from longctx.config import compose
from parallel.registry import load

FOLDER = Path(__file__).parent.parent / "docs" / "deploy"
RAY_VERSION = "2.60.0"
MANIFESTS = {path.name: path for path in sorted(FOLDER.glob("*.yaml"))}

TEXTS = {"*": str}
MOUNT = {"name!": str, "mountPath!": str, "readOnly": bool, "subPath": str}
POD = {
    "metadata": {"labels": TEXTS, "annotations": TEXTS},
    "spec!": {
        "containers!": [
            {
                "name!": str,
                "image!": str,
                "env": [{"name!": str, "value": str}],
                "ports": [{"containerPort!": int, "name": str}],
                "resources!": {"limits!": TEXTS, "requests": TEXTS},
                "volumeMounts": [MOUNT],
            }
        ],
        "volumes": [
            {
                "name!": str,
                "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
                "emptyDir": {"medium": str, "sizeLimit": str},
            }
        ],
        "terminationGracePeriodSeconds": int,
        "nodeSelector": TEXTS,
        "tolerations": [{"key": str, "operator": str, "effect": str, "value": str}],
    },
}
CLUSTER = {
    "rayVersion!": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"idleTimeoutSeconds": int, "upscalingMode": str},
    "authOptions!": {"mode!": str},
    "headGroupSpec!": {"rayStartParams!": TEXTS, "serviceType": str, "template!": POD},
    "workerGroupSpecs!": [
        {
            "groupName!": str,
            "replicas": int,
            "minReplicas!": int,
            "maxReplicas!": int,
            "numOfHosts": int,
            "rayStartParams!": TEXTS,
            "template!": POD,
        }
    ],
}
FIELDS: dict[str, Any] = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "entrypoint!": str,
        "runtimeEnvYAML": str,
        "submissionMode": str,
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec!": CLUSTER,
    },
    "RayService": {"serveConfigV2!": str, "rayClusterConfig!": CLUSTER},
}
CHOICES = {"submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}, "mode": {"token"}}


def read(name: str) -> dict[str, Any]:
    (manifest,) = yaml.safe_load_all(MANIFESTS[name].read_text())
    return manifest


def find_mistakes(value: Any, known: Any, path: str) -> list[str]:
    """What of ``value`` is not as ``known`` has it."""
    if isinstance(known, list):
        items = value if isinstance(value, list) else [value]
        found = [mistake for i, item in enumerate(items) for mistake in find_mistakes(item, known[0], f"{path}[{i}]")]
        return found if isinstance(value, list) else [f"{path} is no list"]
    if not isinstance(known, dict):
        return [] if type(value) is known else [f"{path}: {value!r} is no {known.__name__}"]
    if not isinstance(value, dict):
        return [f"{path} is no mapping"]
    kinds = {name.rstrip("!"): kind for name, kind in known.items()}
    mistakes = [f"{path}.{name[:-1]} is missing" for name in known if name[-1] == "!" and name[:-1] not in value]
    for name, inner in value.items():
        kind = kinds.get(name, kinds.get("*"))
        mistakes += [f"{path}.{name} is unknown"] if kind is None else find_mistakes(inner, kind, f"{path}.{name}")
        if name in CHOICES and inner not in CHOICES[name]:
            mistakes.append(f"{path}.{name}: {inner!r} is none of {CHOICES[name]}")
    return mistakes


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def nodes_of(cluster: dict[str, Any]) -> list[dict[str, float]]:
    """Resources of the workers as Ray counts them, as many as there are at the start."""
    nodes = []
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        node = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        nodes += [node] * group["replicas"]
    return nodes


def test_there_is_one_of_each_kind():
    assert sorted(read(name)["kind"] for name in MANIFESTS) == sorted(FIELDS)


@pytest.mark.parametrize("name", MANIFESTS)
def test_fields_are_those_of_the_definitions(name):
    manifest = read(name)
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["apiVersion"] == "ray.io/v1"
    assert find_mistakes(manifest["spec"], FIELDS[manifest["kind"]], "spec") == []


def test_mistakes_are_found():
    spec = read("rayjob.yaml")["spec"]
    spec["entryPoint"] = spec.pop("entrypoint")
    spec["backoffLimit"] = "2"
    spec["submissionMode"] = "K8sJob"
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["volumes"][0]["emptydir"] = {}
    mistakes = find_mistakes(spec, FIELDS["RayJob"], "spec")
    for words in ("entrypoint is missing", "entryPoint is unknown", "backoffLimit: '2'", "'K8sJob'", "emptydir is unk"):
        assert any(words in mistake for mistake in mistakes), mistakes


@pytest.mark.parametrize("name", MANIFESTS)
def test_nodes_agree(name):
    """One Ray and image everywhere, volumes that are mounted, and groups within their bounds."""
    cluster = cluster_of(read(name))
    assert cluster["rayVersion"] == RAY_VERSION
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "IMAGE"
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == {v["name"] for v in pod["volumes"]}
        assert "/data" in {mount["mountPath"] for mount in container["volumeMounts"]}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert RAY_VERSION in (FOLDER / "Dockerfile").read_text()


def test_the_training_is_one_that_fits():
    """Its command composes, and its ranks have room on the nodes."""
    manifest = read("rayjob.yaml")
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[:2] == ["longctx", "train"]
    line = parse(words[1:])
    config = compose(load(line.command.root), line.command.config_name, line.overrides)
    assert (config.cluster.address, Path(config.output).is_absolute()) == ("auto", True)
    num_ranks = config.parallel.dp_degree * config.parallel.sp_degree
    bundle = Bundle(config.cluster.cpus_per_rank, config.cluster.gpus_per_rank)
    assert find_shortage(nodes_of(cluster_of(manifest)), num_ranks, bundle, config.cluster.strategy) == ""
    assert num_ranks == 16
    assert yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"


def test_nodes_of_mixed_kinds():
    kinds = {(node["CPU"] > 0, node["GPU"] > 0) for node in nodes_of(cluster_of(read("raycluster.yaml")))}
    assert kinds == {(True, True), (True, False)}


def test_the_service_is_one_that_fits():
    """Its file is one of Serve's, its application's keys compose, and the workers have room on the nodes."""
    manifest = read("rayservice.yaml")
    serve = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert set(serve) <= {"proxy_location", "http_options", "applications"}
    (application,) = serve["applications"]
    assert set(application) == {"name", "route_prefix", "import_path", "args"}
    module, _, name = application["import_path"].partition(":")
    source = FOLDER.parent.parent / f"{module.replace('.', '/')}.py"
    assert f"\ndef {name}(args: dict[str, Any])" in source.read_text()  # importing it takes Ray's environment
    config = compose(ServeConfig, "serve", application["args"]["overrides"])
    nodes = nodes_of(cluster_of(manifest))
    prefill, decode = (share_resources(config, list(map(Node, nodes)), role) for role in ("prefill", "decode"))
    assert (prefill, decode) == ((4.0, 1.0), (4.0, 0.0))
    num_prefill = config.cluster.num_prefill_workers * config.cluster.prefill.sp_degree
    assert find_shortage(nodes, num_prefill, Bundle(*prefill), "PACK") == ""
    on_cpus = [node for node in nodes if not node["GPU"]]
    assert find_shortage(on_cpus, config.cluster.num_decode_workers, Bundle(*decode), "SPREAD") == ""


def test_commands_that_are_told_compose():
    lines = [
        line.strip() for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("    longctx ")
    ]
    assert len(lines) == 2
    for text in lines:
        line = parse(shlex.split(text, comments=True)[1:])
        compose(load(line.command.root), line.command.config_name, line.overrides)
        if line.carried:
            inner = parse(line.carried)
            compose(load(inner.command.root), inner.command.config_name, inner.overrides)
