"""The server on a real Ray cluster of three nodes: every part of it killed apart, and a bundle exchanged, under load.

Whatever was accepted, as the clients' own ledger has it, ends with the image that one pipeline makes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")

from runtimes.bundle.folder import Bundle
from tests.serving.ray_cluster import Alone, Ledger, Nodes, rebuilt, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings
ENGINES, FRONT = "ServeReplica:ldm-deploy:engines", "ServeReplica:ldm-deploy:front"


@pytest.fixture(scope="module")
def nodes(reference_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with running([f"emoji={reference_bundle}"], tmp_path_factory.mktemp("ray") / "state") as found:
        yield found


@pytest.fixture(scope="module")
def alone(reference_bundle: Path) -> Alone:
    return Alone(reference_bundle)


def checked(ledger: Ledger, alone: Alone) -> None:
    """Nothing accepted is lost, and no image is another one."""
    ends = ledger.ends()
    assert ledger.jobs and ledger.statuses(ends) == {"completed": len(ledger.jobs)}
    assert alone.wrong(ledger.job_images(ends)) == []
    assert ledger.images and alone.wrong(ledger.images) == []


def test_requests_and_jobs_give_the_images_of_one_pipeline(nodes, alone):
    ledger = Ledger(nodes.server.address)
    with ledger.load(jobs_each=3, pause=0.1), ledger.client() as client:
        assert client.get("/health/ready").json() == {"status": "ready"}
        wait_until(lambda: len(ledger.jobs) == 6 and len(ledger.images) > 5)
    assert ledger.refused == []
    checked(ledger, alone)


def test_a_replica_killed_under_load_costs_no_request(nodes, alone):
    ledger = Ledger(nodes.server.address)
    with ledger.load():
        wait_until(lambda: len(ledger.jobs) > 4 and len(ledger.images) > 4)
        killed, answered = nodes.kill(ENGINES), len(ledger.images)
        wait_until(lambda: len(ledger.images) > answered + 10)
        wait_until(lambda: len(others := nodes.processes(ENGINES)) == 2 and killed not in {p.pid for p in others})
    assert ledger.refused == []
    checked(ledger, alone)


def test_a_front_killed_under_load_loses_no_job(nodes, alone):
    ledger = Ledger(nodes.server.address)
    with ledger.load():
        wait_until(lambda: len(ledger.jobs) > 4 and len(ledger.images) > 4)
        nodes.kill(FRONT)
        answered = len(ledger.images)
        wait_until(lambda: len(ledger.images) > answered + 5)
    checked(ledger, alone)
    wait_until(lambda: len(nodes.processes(FRONT)) == 2)


def test_the_state_service_killed_under_load_loses_no_job(nodes, alone):
    ledger = Ledger(nodes.server.address)
    with ledger.load():
        wait_until(lambda: len(ledger.jobs) > 4)
        killed, accepted = nodes.kill("StateService"), len(ledger.jobs)
        wait_until(lambda: len(ledger.jobs) > accepted + 3)
    assert [p.pid for p in nodes.processes("StateService")] != [killed]
    checked(ledger, alone)


def test_a_bundle_is_exchanged_under_load_without_a_failed_request(nodes, alone, reference_bundle, tmp_path):
    newer, ledger = rebuilt(reference_bundle, tmp_path / "newer"), Ledger(nodes.server.address)
    before = {process.pid for process in nodes.processes("ServeReplica:ldm-deploy")}
    with ledger.load(), ledger.client() as client:
        wait_until(lambda: len(ledger.jobs) > 4 and len(ledger.images) > 4)
        nodes.server.update([f"emoji={newer}"])
        answered = len(ledger.images)
        wait_until(lambda: len(ledger.images) > answered + 5)
        digests = {model["digest"] for model in client.get("/v1/models").json()["data"]}
    with ledger.client() as client:  # those of the load may all have run before
        ledger.submit(client, 90_000)
    assert ledger.refused == []
    assert digests == {Bundle.open(newer).manifest.digest}
    assert {process.pid for process in nodes.processes("ServeReplica:ldm-deploy")} == before, "loaded beside the old"
    checked(ledger, alone)
    assert [end["digest"] for identity, end in ledger.ends().items() if ledger.jobs[identity] == 90_000] == [*digests]


def test_a_node_killed_under_load_loses_no_job(nodes, alone):
    """The last: its place is taken by another node."""
    ledger = Ledger(nodes.server.address)
    with ledger.load(jobs_each=25):
        wait_until(lambda: len(ledger.jobs) > 4 and len(ledger.images) > 4)
        nodes.kill_node()
        answered = len(ledger.images)
        wait_until(lambda: len(ledger.images) > answered + 5)
        nodes.add_node()
    checked(ledger, alone)
    wait_until(lambda: len(nodes.processes(ENGINES)) == 2)
