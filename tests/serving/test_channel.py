"""Messages between server and workers: what one sends the other reads, and what a stranger sends is refused."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time

import numpy as np
import pytest
from PIL import Image

from runtimes.errors import (
    BundleError,
    CancelledError,
    DeployError,
    InputError,
    OutOfMemoryError,
    ParityError,
    UnavailableError,
)
from runtimes.inputs.request import Request
from runtimes.inputs.request_fields import SizeConditions
from runtimes.serving.engine.contract import Generated
from runtimes.serving.engine.waiting import QueueFullError
from runtimes.serving.workers.channel import MOST_ARRAY_BYTES, PROTOCOL, Channel, Message, ProtocolError
from runtimes.serving.workers.encoded import (
    decoded_error,
    decoded_progress,
    decoded_request,
    decoded_result,
    encoded_error,
    encoded_request,
    encoded_result,
)


@pytest.fixture
def pair():
    channels = [Channel(one) for one in socket.socketpair()]
    yield channels
    for channel in channels:
        channel.release()


def sent(pair, message: Message) -> Message:
    sender = threading.Thread(target=pair[0].send, args=(message,))
    sender.start()
    received = pair[1].receive()
    sender.join()
    return received


def raw(pair, *frames: bytes) -> None:
    """Frames as `multiprocessing.connection` puts them, from somebody who writes what he likes."""
    def write():
        try:
            for frame in frames:
                pair[0].connection.send_bytes(frame)
        except OSError:
            pass

    threading.Thread(target=write, daemon=True).start()


def header(**changes) -> bytes:
    return json.dumps({"protocol": PROTOCOL, "kind": "done", "fields": {}, "arrays": [], **changes}).encode()


def test_messages_arrive_as_they_were_sent(pair):
    rng = np.random.default_rng(0)
    arrays: list[np.ndarray] = [
        rng.integers(0, 255, (2, 64, 64, 3), np.uint8), rng.standard_normal((1, 4, 8, 8)).astype(np.float32),
        np.zeros((0, 3), np.float64), np.full((), 3, np.float32), np.arange(6, dtype=np.int64)[::2],
        np.arange(4, dtype=">f4")]
    received = sent(pair, Message("done", {"text": "ä\ud800\n", "n": 1, "x": 1.5, "none": None}, arrays))
    assert received.kind == "done" and received.fields == {"text": "ä\ud800\n", "n": 1, "x": 1.5, "none": None}
    for array, expected in zip(received.arrays, arrays, strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.shape == expected.shape and array.dtype.itemsize == expected.dtype.itemsize


def test_large_messages_of_both_sides_pass_each_other(pair):
    large = np.arange(20_000_000, dtype=np.uint8)
    threads = [threading.Thread(target=channel.send, args=(Message("x", {}, [large]),)) for channel in pair]
    for thread in threads:
        thread.start()
    received: list[Message] = []
    readers = [threading.Thread(target=lambda c=channel: received.append(c.receive())) for channel in pair]
    for reader in readers:
        reader.start()
    for thread in (*threads, *readers):
        thread.join(20)
    assert len(received) == 2 and all((message.arrays[0] == large).all() for message in received)


@pytest.mark.parametrize("frames", [
    [b"GET / HTTP/1.1\r\n\r\n"], [b""], [b"null"], [b"[]"], [b"{}"], [b"\xff\xfe"], [b"[" * 100_000],
    [header(protocol=0)], [header(protocol="1")], [header(protocol=PROTOCOL + 1)], [header(kind=3)],
    [header(kind=None)], [header(fields=[])], [header(arrays={})], [header(arrays=[1])], [header(arrays=[["uint8"]])],
    [header(arrays=[["object", [1]]])], [header(arrays=[["U4", [1]]])], [header(arrays=[[["uint8"], [1]]])],
    [header(arrays=[["uint8", [-1]]])], [header(arrays=[["uint8", [1.5]]])], [header(arrays=[["uint8", [True]]])],
    [header(arrays=[["uint8", 5]])], [header(arrays=[["uint8", [1] * 7]])],
    [header(arrays=[["uint8", [MOST_ARRAY_BYTES + 1]]])], [header(arrays=[["float64", [1 << 20, 1 << 20]]])],
    [header(arrays=[["uint8", [MOST_ARRAY_BYTES // 2]]] * 3)], [header(arrays=[["uint8", [1]]] * 257)],
    [header(arrays=[["uint8", [4]]]), b"123"], [header(arrays=[["uint8", [4]]]), b"12345"],
    [header(arrays=[["uint8", [1 << 40]]])],
])
def test_what_is_no_message_is_refused(pair, frames):
    raw(pair, *frames)
    with pytest.raises(ProtocolError):
        pair[1].receive()


@pytest.mark.parametrize("size", [1 << 30, (1 << 31) - 1])
def test_a_frame_that_claims_to_be_huge_is_refused_before_it_is_read(pair, size):
    pair[0]._stream.sendall(struct.pack("!i", size))
    with pytest.raises(ProtocolError, match="longer than"):
        pair[1].receive()


def test_a_frame_of_negative_length_or_cut_short_ends_the_connection(pair):
    pair[0]._stream.sendall(struct.pack("!i", -7))
    pair[0].close()
    with pytest.raises((ProtocolError, OSError, EOFError)):
        pair[1].receive()


def test_random_bytes_never_do_anything_but_end_the_connection():
    chance = random.Random(0)
    for _ in range(200):
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
        content = header(arrays=[["uint8", [4]]])
        blob = bytearray(struct.pack("!i", len(content)) + content + struct.pack("!i", 4) + b"1234")
        for _ in range(chance.randint(1, 6)):
            blob[chance.randrange(len(blob))] = chance.randrange(256)
        theirs.sendall(bytes(blob))
        theirs.close()
        try:
            channel.receive()
        except (ProtocolError, OSError, EOFError):
            pass
        channel.release()


def test_closing_wakes_who_receives(pair):
    ended = []

    def receive():
        try:
            pair[1].receive()
        except (OSError, EOFError):
            ended.append(True)

    thread = threading.Thread(target=receive)
    thread.start()
    time.sleep(0.05)
    pair[1].close()
    thread.join(5)
    assert ended == [True]


@pytest.mark.parametrize(("fields", "name", "kind"), [
    ({}, "id", int), ({"id": "1"}, "id", int), ({"id": True}, "id", int), ({"id": 1.0}, "id", int),
    ({"x": "1"}, "x", float), ({"x": float("nan")}, "x", float), ({"x": None}, "x", str), ({"x": 1}, "x", bool),
])
def test_a_field_of_another_type_is_refused_by_name(fields, name, kind):
    with pytest.raises(ProtocolError, match=name):
        Message("done", fields).get(name, kind)


# ---- requests, results, errors -----------------------------------------------------------------------------------


def same(ours, theirs) -> bool:
    if isinstance(ours, np.ndarray):
        return bool(np.array_equal(ours, theirs)) and ours.dtype == theirs.dtype
    if isinstance(ours, Image.Image):
        return ours.mode == theirs.mode and ours.size == theirs.size and (
            np.array_equal(np.asarray(ours.convert("RGBA")), np.asarray(theirs.convert("RGBA"))))
    if isinstance(ours, list | tuple) and not isinstance(ours, str):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


RNG = np.random.default_rng(1)
RGB = Image.fromarray(RNG.integers(0, 256, (16, 24, 3), np.uint8))
GREY = RGB.convert("L")


@pytest.mark.parametrize("request_", [
    Request("a cat"), Request(["a", "b"], negative_prompt=["", "c"], images_per_prompt=2, seed=[1, 2, 3, 4]),
    Request("x", steps=3, guidance_scale=1.0, scheduler="euler", eta=0.5, guidance_interval=(0.1, 0.7), tile=64,
            height=128, width=64, weighting=True, long_prompts=True, cache_interval=2, output="numpy"),
    Request("x", aspect="16:9", sizes=SizeConditions(original=(10, 20), aesthetic_score=3.0)),
    Request("x", image=RGB, mask=GREY, strength=0.5), Request("x", image=[RGB, RGB.rotate(90)], images_per_prompt=2),
    Request("x", image=RNG.random((1, 8, 8, 3)), mask=RNG.random((8, 8)).astype(np.float32)),
    Request("x", image=RGB, mask=RGB.convert("P")), Request("x", image=RGB, mask=RGB.convert("1")),
    Request("x", latents=RNG.standard_normal((1, 4, 8, 8)).astype(np.float32), part=(0.5, 1.0)),
], ids=range(10))
def test_a_request_is_the_same_on_the_other_side(pair, request_):
    fields, arrays = encoded_request(request_)
    message = sent(pair, Message("request", {"request": fields}, arrays))
    again = decoded_request(message.get("request", dict), message.arrays)
    for name in Request.__dataclass_fields__:
        assert same(getattr(request_, name), getattr(again, name)), name


def test_files_are_read_where_they_are(pair, tmp_path):
    RGB.save(tmp_path / "a.png")
    fields, arrays = encoded_request(Request("x", image=str(tmp_path / "a.png")))
    assert str(tmp_path) not in json.dumps(fields)
    assert same(RGB, decoded_request(fields, arrays).image)
    with pytest.raises(InputError, match="no such image"):
        encoded_request(Request("x", image="/nowhere.png"))


@pytest.mark.parametrize("fields", [
    {"image": "/etc/passwd"}, {"image": {"array": 1}}, {"image": {"array": -1}}, {"image": {"array": "0"}},
    {"image": {}}, {"image": [{"array": 0, "mode": "RGB", "size": [9, 9]}]}, {"image": {"array": 0, "mode": "RGB"}},
    {"image": {"array": 0, "mode": "exotic", "size": [1, 1]}}, {"latents": "/etc/passwd"}, {"latents": {"array": 7}},
    {"image": {"array": 0, "mode": "RGB", "size": [100_000, 100_000]}}, {"unknown": 1}, {"steps": "many"},
    {"prompt": 3}, {"image": {"array": 0, "mode": "P", "size": [3, 1], "palette": "x"}},
])
def test_a_request_that_cannot_be_is_refused(fields):
    with pytest.raises((ProtocolError, InputError)):
        decoded_request(fields, [np.zeros(3, np.uint8)])


@pytest.mark.parametrize("result", [
    Generated([RGB, RGB], "d" * 64, (True, False), 1.5, 2.25, 0.5), Generated(RNG.random((1, 8, 8, 3)), "d"),
    Generated(RNG.standard_normal((2, 4, 8, 8)).astype(np.float32), "d", (), 2.0),
], ids=("pillow", "pixels", "latents"))
def test_a_result_is_the_same_on_the_other_side(pair, result):
    fields, arrays = encoded_result(result)
    again = decoded_result(sent(pair, Message("done", fields, arrays)))
    assert same(result.images, again.images)
    assert (again.digest, again.flagged, again.seconds, again.batch, again.work_seconds) == (
        result.digest, result.flagged, result.seconds, result.batch, result.work_seconds)
    if isinstance(again.images, np.ndarray):
        again.images[:] = 0  # the caller may write to it, as in one process


def test_a_result_or_preview_that_cannot_be_is_refused():
    fields, _ = encoded_result(Generated([RGB], "d", (True,)))
    for changes, arrays in (({}, []), ({}, [np.zeros((1, 2, 2, 4), np.uint8)]), ({}, [np.zeros((1, 2, 2, 3))]),
                            ({"flagged": [1]}, [np.zeros((1, 2, 2, 3), np.uint8)]), ({"digest": 3}, [np.zeros(3)])):
        with pytest.raises(ProtocolError):
            decoded_result(Message("done", {**fields, **changes}, arrays))
    with pytest.raises(ProtocolError):
        decoded_progress(Message("step", {"index": 1, "total": 2}, [np.zeros((2, 2), np.float32)]))


@pytest.mark.parametrize("error", [
    InputError("a", where="b", fix="c"), BundleError("a"), ParityError("a"), UnavailableError("a"),
    OutOfMemoryError("a"), DeployError("a"), CancelledError(3, 7),
])
def test_an_error_is_the_same_on_the_other_side(error):
    again = decoded_error(Message("failed", encoded_error(error)))
    assert type(again) is type(error) and str(again) == str(error)


def test_errors_of_more_kinds_are_the_nearest_of_ours_and_hide_what_is_none():
    assert type(decoded_error(Message("failed", encoded_error(QueueFullError(3, 1.0))))) is UnavailableError
    hidden = decoded_error(Message("failed", encoded_error(ValueError("/home/secret"))))
    assert type(hidden) is DeployError and "secret" not in str(hidden) and "ValueError" in str(hidden)
    for fields in ({"error": "SystemExit", "what": "", "where": "", "fix": ""}, {"error": "InputError"}, {}):
        with pytest.raises(ProtocolError):
            decoded_error(Message("failed", fields))
