"""The cache of finished images, and equal work that is done once."""

from __future__ import annotations

import asyncio
import threading

import pytest

from runtimes.serving.state.order import Order, Output
from runtimes.serving.state.result_cache import ENTRY_BYTES, ResultCache, SharedWork
from runtimes.serving.state.written_images import WrittenImage


def images(size: int) -> tuple[WrittenImage, ...]:
    return (WrittenImage(b"x" * size, "png", "0" * 64, 1),)


def test_the_images_used_longest_ago_leave_first_and_the_bytes_are_bounded():
    cache = ResultCache(3 * (ENTRY_BYTES + 100))
    for key in "abc":
        cache.put(key, images(100))
    assert cache.get("a") is not None
    cache.put("d", images(100))
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    cache.put("a", images(50))
    cache.put("huge", images(100_000))
    assert cache.get("huge") is None and cache.bytes == 2 * 100 + 50 + 3 * ENTRY_BYTES <= cache.most_bytes
    assert (cache.hits, cache.misses) == (4, 2)


def test_no_bytes_cache_nothing():
    cache = ResultCache(0)
    cache.put("a", ())
    cache.put("b", images(1))
    assert cache.get("a") is None and cache.entries == cache.bytes == cache.misses == 0


def test_threads_share_a_cache():
    cache = ResultCache(20 * (ENTRY_BYTES + 64))

    def work(part: int) -> None:
        for number in range(500):
            cache.put(str((part * number) % 37), images(64))
            cache.get(str(number % 37))

    threads = [threading.Thread(target=work, args=(part,)) for part in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert cache.bytes == cache.entries * (ENTRY_BYTES + 64) <= cache.most_bytes and cache.entries == 20


@pytest.mark.parametrize("other", [
    Order.of("m", {"prompt": "a", "seed": 2}), Order.of("n", {"prompt": "a", "seed": 1}),
    Order.of("m", {"prompt": "a", "seed": 1, "steps": 3}),
    Order.of("m", {"prompt": "a", "seed": 1}, output=Output("webp")),
])
def test_a_key_names_the_order_and_the_bundle(other):
    order = Order.of("m", {"prompt": "a", "seed": 1})
    assert order.key("d") == Order.from_json(order.to_json(), {}).key("d") != order.key("e")
    assert other.key("d") != order.key("d")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_equal_work_is_done_once_and_a_cancelled_client_leaves_it_to_the_others():
    async def trial() -> None:
        shared, started, go = SharedWork[int](), list[str](), asyncio.Event()

        async def work() -> int:
            started.append("x")
            await go.wait()
            return 7

        clients = [asyncio.ensure_future(shared.get("k", work)) for _ in range(3)]
        await settle()
        clients[0].cancel()
        await settle()
        go.set()
        assert await asyncio.gather(*clients[1:]) == [7, 7] and started == ["x"] and clients[0].cancelled()
        assert await shared.get("k", work) == 7 and len(started) == 2, "ended work is not shared any more"

    asyncio.run(trial())


def test_the_last_client_that_leaves_ends_the_work_and_the_next_one_starts_anew():
    async def trial() -> None:
        shared, ended = SharedWork[int](), list[str]()

        async def endless() -> int:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("x")
            return 0

        async def quick() -> int:
            return 1

        clients = [asyncio.ensure_future(shared.get("k", endless)) for _ in range(2)]
        await settle()
        for client in clients:
            assert not ended
            client.cancel()
            await settle()
        assert ended == ["x"] and await shared.get("k", quick) == 1

    asyncio.run(trial())


def test_an_error_reaches_all_who_wait_and_nobody_after():
    async def trial() -> None:
        shared = SharedWork[int]()

        async def fails() -> int:
            await asyncio.sleep(0)
            raise ValueError("no")

        async def works() -> int:
            return 1

        found = await asyncio.gather(*(shared.get("k", fails) for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in found] == ["no"] * 3 and await shared.get("k", works) == 1

    asyncio.run(trial())
