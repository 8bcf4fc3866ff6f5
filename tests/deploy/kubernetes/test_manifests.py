"""Every file that `export-kubernetes` writes fits the schemas, and what one file says of another is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from deploy.kubernetes.kubernetes_files import (
    KUBERAY_VERSION,
    KUBERNETES_VERSION,
    QUEUE_METRIC,
    RAY_VERSION,
    export_kubernetes,
    rendered,
)
from deploy.kubernetes.kubernetes_options import KubernetesOptions
from runtimes.bundle.folder import Bundle
from runtimes.errors import InputError
from runtimes.serving.options import EngineOptions, ServerOptions
from runtimes.serving.workers.placement import placed
from tests.deploy.kubernetes.validation import KUBERNETES, RAY_SERVICE, faults
from tests.runtimes.fakes import write_pipeline_bundle

ROOT = Path(__file__).resolve().parents[3]
VARIANTS = {
    "single": KubernetesOptions(),
    "single-gpu": KubernetesOptions(gpu=2, cpu=8, memory="32Gi", host="images.example.org", namespace="images"),
    "single-volume": KubernetesOptions(bundles_in="image-volume", storage_class="fast"),
    "single-claim": KubernetesOptions(bundles_in="claim", bundles_from="models", secret="given"),
    "engines": KubernetesOptions(layout="engines", name="img", host="images.example.org"),
    "engines-gpu": KubernetesOptions(layout="engines", gpu=1, scale_on="queue", replicas="2:9", bundles_in="claim"),
    "ray": KubernetesOptions(layout="ray", image="registry.example.org/images:7"),
    "ray-gpu": KubernetesOptions(layout="ray", gpu=4, cpu=16, replicas="1:3", bundles_in="claim", name="img"),
    "ray-volume": KubernetesOptions(layout="ray", bundles_in="image-volume", host="images.example.org", cpu=0.5),
}
Document = dict[str, Any]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return [write_pipeline_bundle(folder / name, 16) for name in ("emoji", "landscapes-2")]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, bundles) -> tuple[KubernetesOptions, dict[str, str]]:
    options = VARIANTS[request.param]
    return options, dict(rendered(bundles, options))


def documents(files: dict[str, str]) -> list[Document]:
    return [document for name, text in files.items() if name.endswith(".yaml") and name != "kustomization.yaml"
            for document in yaml.load_all(text, yaml.CSafeLoader)]


def pods(files: dict[str, str]) -> dict[str, Document]:
    """Pod templates by the name of what makes them."""
    found = {}
    for document in documents(files):
        spec, name = document["spec"], document["metadata"]["name"]
        if document["kind"] in ("Deployment", "StatefulSet"):
            found[name] = spec["template"]
        if document["kind"] == "RayService":
            cluster = spec["rayClusterConfig"]
            found[f"{name} head"] = cluster["headGroupSpec"]["template"]
            found |= {f"{name} {g['groupName']}": g["template"] for g in cluster["workerGroupSpecs"]}
    return found


def of_kind(files: dict[str, str], *kinds: str) -> Iterator[tuple[str, Document]]:
    return ((d["metadata"]["name"], d["spec"]) for d in documents(files) if d["kind"] in kinds)


def selected(files: dict[str, str], labels: dict[str, str]) -> list[Document]:
    return [pod for pod in pods(files).values() if labels.items() <= pod["metadata"]["labels"].items()]


def test_every_object_fits_the_schema_of_its_kind(variant):
    _, files = variant
    assert {d["kind"]: found for d in documents(files) if (found := faults(d))} == {}


@pytest.mark.parametrize("spoil", [
    lambda d: d["spec"].update(replica=1), lambda d: d["spec"].pop("selector"),
    lambda d: d["spec"]["template"]["spec"]["containers"][0]["ports"][0].update(containerPort="http"),
    lambda d: d["spec"]["template"]["spec"].update(securityContext={"runAsNonroot": True})])
def test_a_fault_in_an_object_is_found(bundles, spoil):
    document = next(d for d in documents(dict(rendered(bundles, VARIANTS["single"]))) if d["kind"] == "StatefulSet")
    spoil(document)
    assert faults(document) != []


@pytest.mark.parametrize("spoil", [
    lambda s: s.update(rayClusterSpec={}), lambda s: s["rayClusterConfig"].pop("headGroupSpec"),
    lambda s: s["rayClusterConfig"]["workerGroupSpecs"][0].update(maxReplicas="4"),
    lambda s: s["rayClusterConfig"]["headGroupSpec"]["template"]["spec"].update(container=[])])
def test_a_fault_in_a_ray_service_is_found(bundles, spoil):
    document = next(d for d in documents(dict(rendered(bundles, VARIANTS["ray"]))) if d["kind"] == "RayService")
    spoil(document["spec"])
    assert faults(document) != []


def test_kustomization_names_every_manifest(variant):
    options, files = variant
    kustomization = yaml.safe_load(files["kustomization.yaml"])
    assert sorted(kustomization["resources"]) == sorted(
        name for name in files if name.endswith(".yaml") and name != "kustomization.yaml")
    assert kustomization.get("namespace", "") == options.namespace


def test_selectors_name_labels_that_pods_have(variant):
    _, files = variant
    for name, spec in of_kind(files, "Deployment", "StatefulSet"):
        assert spec["selector"]["matchLabels"].items() <= pods(files)[name]["metadata"]["labels"].items()
    selectors = [spec["selector"]["matchLabels"] for _, spec in of_kind(files, "PodDisruptionBudget")]
    selectors += [spec["podSelector"]["matchLabels"] for _, spec in of_kind(files, "NetworkPolicy")]
    selectors += [spec["selector"] for _, spec in of_kind(files, "Service")]
    assert all(selected(files, labels) for labels in selectors)
    policed = [pod for _, spec in of_kind(files, "NetworkPolicy")
               for pod in selected(files, spec["podSelector"]["matchLabels"])]
    assert all(pod in policed for pod in pods(files).values()), "a pod without a network policy"


def test_ports_that_are_named_are_ports_of_the_pods(variant):
    _, files = variant
    for name, spec in of_kind(files, "Service"):
        for pod in selected(files, spec["selector"]):
            named = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in spec["ports"]} <= named, name
    for pod in pods(files).values():
        container = pod["spec"]["containers"][0]
        ports = {port["name"] for port in container.get("ports", [])}
        assert {container[p]["httpGet"]["port"] for p in container if p.endswith("Probe")} <= ports
    for _, spec in of_kind(files, "Ingress"):
        backend = spec["rules"][0]["http"]["paths"][0]["backend"]["service"]
        services = {name: {port["port"] for port in s["ports"]} for name, s in of_kind(files, "Service")}
        services |= {s["serveService"]["metadata"]["name"]: {p["port"] for p in s["serveService"]["spec"]["ports"]}
                     for _, s in of_kind(files, "RayService")}
        assert backend["port"]["number"] in services[backend["name"]]


def test_every_mount_has_its_volume_and_every_volume_is_mounted(variant):
    _, files = variant
    made = {name: {c["metadata"]["name"] for c in spec.get("volumeClaimTemplates", [])}
            for name, spec in of_kind(files, "StatefulSet")}
    claims = {name for name, _ in of_kind(files, "PersistentVolumeClaim")}
    for name, pod in pods(files).items():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts = [mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
        assert set(mounts) == set(volumes) | made.get(name, set()) and len(mounts) == len(set(mounts))
        assert {v["persistentVolumeClaim"]["claimName"] for v in volumes.values()
                if "persistentVolumeClaim" in v} <= claims


def test_no_pod_has_rights_that_it_does_not_need(variant):
    _, files = variant
    for name, pod in pods(files).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec.get("automountServiceAccountToken") is False or name.endswith(" head")  # Ray's autoscaler needs it
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        for container in spec["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert {"/tmp", "/cache"} <= writable <= {"/tmp", "/cache", "/state"}
        assert not any("hostPath" in volume for volume in spec["volumes"])


def test_keys_are_named_and_never_written(variant):
    options, files = variant
    assert not any(document["kind"] == "Secret" for document in documents(files))
    secret = options.secret or f"{options.name}-keys"
    named = {volume["secret"]["secretName"] for pod in pods(files).values() for volume in pod["spec"]["volumes"]
             if "secret" in volume}
    assert named == {secret}
    command = next(line for line in files["README.md"].splitlines() if "create secret generic" in line)
    assert secret in command
    keys = {item["key"] for pod in pods(files).values() for volume in pod["spec"]["volumes"] if "secret" in volume
            for item in volume["secret"]["items"]}
    assert all(f"--from-literal={key}=" in files["README.md"] for key in keys)


def test_a_gpu_is_asked_for_where_images_are_generated_and_only_there(variant):
    options, files = variant
    asked = {name: pod["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
             for name, pod in pods(files).items()}
    generates = {"single": options.name, "engines": f"{options.name}-engines", "ray": f"{options.name} engines"}
    assert asked.pop(generates[options.layout]) == (str(options.gpu) if options.gpu else None)
    assert set(asked.values()) <= {None}


def test_a_pod_has_the_time_to_drain(variant):
    options, files = variant
    for pod in pods(files).values():
        container = pod["spec"]["containers"][0]
        stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod["spec"]["terminationGracePeriodSeconds"] > options.drain_seconds + stop


def test_the_autoscaler_scales_what_is_there(variant):
    options, files = variant
    for _, spec in of_kind(files, "HorizontalPodAutoscaler"):
        target = spec["scaleTargetRef"]
        made = next(d for d in documents(files) if d["kind"] == target["kind"])
        assert (made["metadata"]["name"], made["apiVersion"]) == (target["name"], target["apiVersion"])
        assert "replicas" not in made["spec"], "applying it again would undo what was scaled"
        assert (spec["minReplicas"], spec["maxReplicas"]) == (options.least, options.most)
    assert (options.layout == "engines") == any(of_kind(files, "HorizontalPodAutoscaler"))


def test_the_server_is_started_with_options_that_it_has(variant):
    options, files = variant
    for name, spec in of_kind(files, "StatefulSet"):
        command, *arguments = spec["template"]["spec"]["containers"][0]["args"]
        given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if argument[0] == "-")
        assert command == "serve" and [a for a in arguments if a[0] != "-"] == [
            "emoji=/bundles/emoji", "landscapes-2=/bundles/landscapes-2"]
        ports = {k: int(v) for k, v in given.items() if k.endswith("port")}
        made = ServerOptions(**{k.replace("-", "_"): v for k, v in {**given, **ports}.items() if k != "digest"})
        assert made.host == "0.0.0.0" and made.state == "/state", name
        assert (made.engine_port > 0) == (options.layout == "engines")
        assert (made.device == "none") == (options.layout == "engines")


def test_a_server_without_a_device_leaves_generating_to_engines_that_join():
    joined = ServerOptions(device="none", engine_port=8001, engine_key_file="key")
    assert placed(joined) == [] and joined.first_device == "cpu"
    with pytest.raises(InputError, match="nothing would generate"):
        ServerOptions(device="none")
    with pytest.raises(InputError, match="an engine needs a device"):
        placed(EngineOptions(device="none"))


def test_ray_serves_configuration_is_one_that_ray_takes(bundles):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own use of pydantic
        from ray.serve.schema import ServeDeploySchema

    for name in ("ray", "ray-gpu", "ray-volume"):
        spec = next(of_kind(dict(rendered(bundles, VARIANTS[name])), "RayService"))[1]
        made = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
        assert [d.name for d in made.applications[0].deployments] == ["engines", "front"]
        assert spec["rayClusterConfig"]["rayVersion"] == RAY_VERSION
        assert "CPU" in spec["rayClusterConfig"]["headGroupSpec"]["resources"]


def test_the_queue_metric_and_the_probes_are_the_servers_own(bundles):
    source = "".join(file.read_text() for file in (ROOT / "runtimes" / "serving" / "http").glob("*.py"))
    assert f'"{QUEUE_METRIC}"' in source
    for pod in pods(dict(rendered(bundles, VARIANTS["engines"]))).values():
        container = pod["spec"]["containers"][0]
        assert all(f'"{container[p]["httpGet"]["path"]}"' in source for p in container if p.endswith("Probe"))


def test_releases_are_those_of_the_schemas_and_of_the_image():
    pinned = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()
              if line and not line.startswith("#")]
    assert next(str(r.specifier) for r in pinned if r.name == "ray") == f"=={RAY_VERSION}"
    assert f"kubernetes-validate {KUBERNETES_VERSION}." in KUBERNETES["source"]
    assert f"v{KUBERAY_VERSION} " in RAY_SERVICE["source"]


def test_the_dockerfile_copies_every_bundle_from_a_context_that_the_readme_names(variant):
    options, files = variant
    contexts = set(re.findall(r"COPY --from=(\S+)", files["Dockerfile"]))
    assert contexts == (set() if options.bundles_in == "claim" else {"emoji", "landscapes-2"})
    assert {name for name, _ in re.findall(r"--build-context (\S+)=(\S+)", files["README.md"])} == contexts


@pytest.mark.parametrize(("options", "where"), [
    ({"name": "Images"}, "--name"), ({"layout": "helm"}, "--layout"), ({"replicas": "4:1"}, "--replicas"),
    ({"replicas": "many"}, "--replicas"), ({"memory": "8 GB"}, "--memory"), ({"host": "http://x"}, "--host"),
    ({"gpu": -1}, "--gpu"), ({"cpu": 0}, "--cpu"), ({"image": "a b"}, "--image"), ({"image": "a\nb: c"}, "--image"),
    ({"replicas": "2:3"}, "--replicas"), ({"scale_on": "queue"}, "--scale-on"),
    ({"bundles_from": "x"}, "--bundles-from"),
    ({"drain_seconds": 0}, "--drain-seconds"), ({"storage_class": "a: b"}, "--storage-class")])
def test_what_kubernetes_would_refuse_is_refused(options, where):
    with pytest.raises(InputError) as caught:
        KubernetesOptions(**options)
    assert caught.value.where == where and caught.value.fix


def test_the_command_writes_a_folder_and_replaces_only_its_own(tmp_path, bundles):
    out, folder = tmp_path / "k8s", bundles[0].path
    run = [sys.executable, "-m", "deploy", "export-kubernetes", str(folder), "-o", str(out), "--layout", "engines"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in out.iterdir()} == set(rendered_names(bundles, "engines"))
    assert "landscapes-2" not in (out / "server.yaml").read_text()
    export_kubernetes(bundles, out, KubernetesOptions())
    assert not (out / "engines.yaml").exists() and "landscapes-2" in (out / "server.yaml").read_text()
    (out / "mine.yaml").write_text("{}")
    with pytest.raises(InputError, match=r"mine\.yaml"):
        export_kubernetes(bundles, out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "kustomization.yaml").write_text("resources: []")
    with pytest.raises(InputError, match="not written by this command"):
        export_kubernetes(bundles, other)
    assert (other / "kustomization.yaml").read_text() == "resources: []"


def rendered_names(bundles: list[Bundle], layout: str) -> Iterator[str]:
    return (name for name, _ in rendered(bundles, KubernetesOptions(layout=layout)))


def test_a_bundle_whose_folder_cannot_name_a_model_is_refused(tmp_path, bundles):
    odd = tmp_path / "Odd name"
    odd.symlink_to(bundles[0].path)
    same = tmp_path / "emoji"
    same.symlink_to(bundles[0].path)
    renamed = write_pipeline_bundle(tmp_path / "Upper_Case", 16)
    with pytest.raises(InputError, match="small letters"):
        export_kubernetes([renamed], tmp_path / "out")
    with pytest.raises(InputError, match="the same name"):
        export_kubernetes([bundles[0], Bundle.open(same)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_digests_pin_what_comes_in_an_image(bundles):
    text = dict(rendered(bundles, KubernetesOptions()))["server.yaml"]
    for bundle in bundles:
        digest = bundle.manifest.digest.removeprefix("sha256:")
        assert f"--digest={bundle.path.name}={digest[:16]}" in text
    service = next(of_kind(dict(rendered(bundles, VARIANTS["ray"])), "RayService"))[1]
    assert json.dumps(bundles[0].manifest.digest.removeprefix("sha256:")) in service["serveConfigV2"]
