"""The arithmetic of the load, its ledger and the queueing model: figures are worth what these are."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
import threading
from pathlib import Path

import httpx
import pytest

from tests.peers.serving.embedded import WholeRequests
from tests.peers.serving.measure import Cell
from tests.peers.serving.queueing import Rates, predict, simulate, simulated
from tests.peers.serving.tables import aims
from tests.serving.ledger import Ledger, growth
from tests.serving.load_client import (
    OK,
    STEPS,
    Ask,
    Plan,
    Record,
    arrivals,
    asks,
    closed_loop,
    due_within,
    open_loop,
    percentile,
    within,
)
from tests.serving.soak_requests import digest, png, source, wanted


def test_a_percentile_is_a_value_that_so_many_do_not_exceed():
    values = [float(v) for v in random.Random(0).sample(range(1, 101), 100)]
    assert percentile(values, 0.95) == 95 and percentile(values, 0.5) == 50
    assert percentile(values, 1.0) == 100 and percentile(values, 0.0) == 1
    assert percentile([3.0], 0.95) == 3.0 and math.isnan(percentile([], 0.5))


def test_every_block_of_requests_has_every_number_of_steps_and_no_seed_comes_twice():
    first = list(itertools.islice(asks(STEPS, 4), 300))
    assert all(sorted(a.steps for a in first[i:i + 3]) == sorted(STEPS) for i in range(0, 300, 3))
    assert len({a.seed for a in first}) == len({a.prompt for a in first}) == 300
    assert first == list(itertools.islice(asks(STEPS, 4), 300))
    assert not {a.seed for a in first} & {a.seed for a in itertools.islice(asks(STEPS, 5), 300)}


def test_arrivals_have_the_rate_and_the_spread_of_poisson():
    times = arrivals(20, 1000, 3)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert len(times) == pytest.approx(20_000, rel=0.03) and max(times) < 1000
    assert statistics.stdev(gaps) == pytest.approx(statistics.fmean(gaps), rel=0.05)


def test_clients_of_a_closed_loop_have_one_request_at_a_time_each():
    under_way, most = [0], [0]

    async def send(ask: Ask) -> tuple[int, bytes]:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        await asyncio.sleep(0.01)
        under_way[0] -= 1
        return OK, b"image"

    records = asyncio.run(closed_loop(send, Plan("", "openai", 0.3, clients=5)))
    assert most == [5] and under_way == [0] and len(records) >= 10
    assert all(r.status == OK and r.bytes == 5 and r.seconds >= 0.01 for r in records)


def test_an_open_loop_sends_though_nothing_was_answered_and_counts_from_the_arrival():
    async def send(ask: Ask) -> tuple[int, bytes]:
        await asyncio.sleep(0.5)
        return OK, b""

    plan = Plan("", "openai", 0.4, rate=50)
    records = asyncio.run(open_loop(send, plan))
    assert [r.due for r in records] == arrivals(50, 0.4, 0) and len(records) > 5
    assert all(r.seconds >= 0.5 for r in records)


def test_what_is_refused_or_unanswered_is_recorded_with_its_reason_and_is_in_no_figure():
    answers = itertools.cycle([(429, b"full"), (OK, b"image"), None])

    async def send(ask: Ask) -> tuple[int, bytes]:
        await asyncio.sleep(0.001)
        answer = next(answers)
        if answer is None:
            raise httpx.ReadError("gone")
        return answer

    records = asyncio.run(closed_loop(send, Plan("", "openai", 0.5)))
    assert [r.status for r in records[:3]] == [429, OK, 0]
    assert records[0].reason == "full" and "gone" in records[2].reason
    assert {r.status for r in within(records, 0, 9)} == {r.status for r in due_within(records, 0, 9)} == {OK}
    cell = Cell()
    cell.add(Plan("", "openai", 0.5), records, 0.1, 1000)
    assert sum(cell.errors.values()) == sum(r.status != OK for r in records)


def test_a_cell_counts_what_ended_after_the_ramp_and_before_the_end():
    records = [Record(4, due, due + 0.5, OK) for due in (0.0, 1.0, 1.9, 5.0, 9.4, 9.6)]
    cell = Cell(clients=1)
    cell.add(Plan("", "openai", 10.0), records, 0.1, 1000)
    assert cell.ended == [3] and cell.seconds == [8.0] and cell.images_per_second == 3 / 8
    cell = Cell(rate=1)
    cell.add(Plan("", "openai", 10.0, rate=1.0), records, 0.1, 1000)
    assert len(cell.latencies[4]) == 3 and cell.latency(4, 0.95) == pytest.approx(0.5)


def test_an_aim_that_was_not_measured_is_neither_met_nor_missed():
    def cell(rate: int, latency: float) -> Cell:
        return Cell(8, seconds=[10.0], ended=[10 * rate], latencies={4: [latency]})

    assert {aim.met for aim in aims({}, {})} == {None}
    closed = {"ours": {8: cell(14, 0.1)}, "apart": {8: cell(10, 0.4)}, "diffusers": {8: cell(4, 1.0)},
              "whole": {8: cell(13, 0.2)}}
    assert [aim.met for aim in aims(closed, {})] == [True, False, False]


# ---- whole batches -----------------------------------------------------------------------------------------------


def test_whole_batches_are_of_equal_steps_the_oldest_first_and_answer_all_or_fail_all():
    from runtimes.inputs.request import Request

    batches: list[list[int]] = []
    gate = threading.Event()

    def run(batch):
        gate.wait(10)
        batches.append([request.steps for request in batch])
        if batch[0].steps == 9:
            raise ValueError("no")
        return [request.seed for request in batch]

    whole = WholeRequests(run, most=3)
    first = whole.submit(Request("a", steps=2, seed=0))
    futures = [whole.submit(Request("a", steps=steps, seed=seed)) for seed, steps in enumerate((4, 9, 4, 4, 4, 9), 1)]
    gate.set()
    assert first.result(10) == 0 and [futures[i].result(10) for i in (0, 2, 3, 4)] == [1, 3, 4, 5]
    assert all(isinstance(futures[i].exception(10), ValueError) for i in (1, 5))
    assert sorted(map(tuple, batches[-3:])) == [(4,), (4, 4, 4), (9, 9)]


# ---- the queueing model ------------------------------------------------------------------------------------------

ALONE = Rates((0.0,), (0.01,), (0.0,))  # one request at a time, 10 ms a step
BATCHED = Rates((0.002,) * 8, tuple(0.01 * n**0.7 for n in range(1, 9)), (0.003,) * 8)


def test_one_at_a_time_waits_as_pollaczek_and_khinchine_say():
    rate, seconds = 5.0, [0.01 * s for s in STEPS]
    mean, second = statistics.fmean(seconds), statistics.fmean(s * s for s in seconds)
    expected = mean + rate * second / (2 * (1 - rate * mean))
    found = simulated(ALONE, STEPS, rate, count=80_000)
    assert statistics.fmean(s for of in found.values() for s in of) == pytest.approx(expected, rel=0.04)


def test_the_formula_is_that_of_processor_sharing():
    # Equal speed at any number of requests: the mean of M/G/1-PS is S / (1 - rho), and each kind's is its share of it.
    constant = Rates((0.0,) * 64, tuple(0.01 * n for n in range(1, 65)), (0.0,) * 64)
    mean = 0.01 * statistics.fmean(STEPS)
    for rate in (1.0, 4.0, 6.0):
        found = predict(constant, STEPS, rate)
        assert found.mean == pytest.approx(mean / (1 - rate * mean), rel=1e-3)
        assert all(found.mean_of[s] == pytest.approx(0.01 * s / (1 - rate * mean), rel=1e-3) for s in STEPS)


def test_the_formula_and_the_rounds_agree_while_the_engine_is_not_nearly_full():
    for share in (0.2, 0.5, 0.7):
        rate = share * BATCHED.per_second(STEPS, 8)
        found = simulated(BATCHED, STEPS, rate)
        rounds = statistics.fmean(s for of in found.values() for s in of)
        assert predict(BATCHED, STEPS, rate).mean == pytest.approx(rounds, rel=0.15)


def test_a_server_that_drowns_is_said_to():
    assert predict(BATCHED, STEPS, 1.01 * BATCHED.per_second(STEPS, 8)).mean == math.inf


def test_a_round_takes_what_came_and_everyone_in_it_goes_on_by_a_step():
    rates = Rates((1.0, 1.5), (10.0, 12.0), (2.0, 3.0), other=0.5)
    # The first starts alone; the second joins at 11, they share a round of 12; the first ends with it.
    assert simulate(rates, [(0.0, 2), (5.0, 2), (6.0, 1)]) == pytest.approx([
        1 + 10 + 1 + 12 + 2 + 0.5,  # 26.5
        26 - 5 + 1 + 12 + 3 + 0.5,  # beside the third, with which it ends
        26 - 6 + 1 + 12 + 3 + 0.5])


# ---- the ledger --------------------------------------------------------------------------------------------------


def test_a_ledger_knows_what_is_lost_wrong_and_doubled(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for identity, number in (("a", 1), ("b", 2), ("c", 3)):
        ledger.accept(identity, number)
    ledger.job_ended("a", "completed")
    ledger.job_ended("b", "running")
    assert ledger.lost == ["b", "c"]
    ledger.made(1, ["x"])
    ledger.made(1, ["y"])
    ledger.made(2, ["z"])
    assert ledger.wrong({1: ["x"], 2: ["z"]}) == [1] and ledger.wrong({1: ["x"]}) == [1, 2]
    assert not ledger.faults
    ledger.job_ended("a", "failed")
    ledger.accept("a", 1)
    ledger.accept("d", 4, again=True)
    assert len(ledger.faults) == 3 and len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3


def test_growth_is_that_of_the_line_through_noise():
    chance = random.Random(0)
    samples = [(float(t), 100.0 + 0.01 * t + chance.gauss(0, 0.5)) for t in range(1000)]
    assert growth(samples) == pytest.approx(0.1, abs=0.01)
    assert growth([(t, 100.0 + chance.gauss(0, 0.5)) for t in range(1000)]) == pytest.approx(0, abs=0.005)


def test_a_request_of_a_number_is_the_same_every_time():
    assert [wanted(n) for n in range(50)] == [wanted(n) for n in range(50)]
    assert {w.edit for w in map(wanted, range(200))} == {"", "image", "mask"}
    assert digest(png(source(3))) == digest(source(3)) != digest(source(4))


def test_the_model_is_set_beside_what_was_measured_and_everything_is_shown(tmp_path: Path, capsys):
    from tests.peers.results import new_report
    from tests.peers.serving.tables import compared, show_all

    def cell(**fields) -> Cell:
        return Cell(seconds=[8.0], ended=[80], latencies={s: [0.012 * s] * 20 for s in STEPS}, seeds=[50],
                    load_seconds=10.0, memory=[10**8], **fields)

    closed, open_ = {"ours": {1: cell(clients=1)}, "apart": {1: cell(clients=1)}}, {"ours": {3.0: cell(rate=3.0)}}
    rows = compared(BATCHED, closed["ours"], open_["ours"])
    assert rows[0]["rate"] == 3.0 and rows[0]["mean"]["measured"] == pytest.approx(0.012 * statistics.fmean(STEPS))
    assert all(rows[0][f"p95 of {s} steps"]["rounds"] > 0.01 * s for s in STEPS)
    report = new_report(threads=2) | {"queueing": rows, "load_after": 0.0, "psnr_db": {}}
    show_all(report, closed, open_, aims(closed, open_), tmp_path / "serving.json")
    shown = capsys.readouterr().out
    assert "Open loops" in shown and "queueing model" in shown and "not measured" in shown
