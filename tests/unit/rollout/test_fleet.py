"""Servers that die, hang, come back, join and leave."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from scripted import KNOWN, Break, Status, answer, serve

from megatron_vespo.errors import UserError
from megatron_vespo.rollout import fleet as fleet_module
from megatron_vespo.rollout import watch as watch_module
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.dispatch import Dispatcher, LoadMeter
from megatron_vespo.rollout.fleet import Fleet, State
from megatron_vespo.rollout.protocol import Generation, ServerError, ServerInfo
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.server import free_port
from megatron_vespo.rollout.watch import Watch


def open_member(url: str) -> tuple[SGLangControl, SGLangClient]:
    return SGLangControl(url), SGLangClient(url, vocab_size=32, timeout=30)


def say_version(version: str) -> Callable[[str], Any]:
    return lambda path: KNOWN[path] | ({"weight_version": version} if path == "/model_info" else {})


@contextmanager
def make_fleet(addresses: Callable[[], list[str]], **more: Any) -> Iterator[Fleet]:
    fleet = Fleet(addresses, open_member, patience=5, **more)
    try:
        yield fleet
    finally:
        fleet.close()


@contextmanager
def watching(fleet: Fleet, hang_timeout: float = 60.0) -> Iterator[None]:
    watch = Watch(fleet, hang_timeout=hang_timeout, max_restarts=0)
    watch.start()
    try:
        yield
    finally:
        watch.close()
        watch._thread.join()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def generate(
    fleet: Fleet, count: int = 1, meanwhile: Callable[[], None] = lambda: None
) -> tuple[list[Generation], int]:
    """Responses to ``count`` requests, each on a route of its own, and how many were sent again."""

    async def run() -> tuple[list[Generation], int]:
        dispatcher = Dispatcher(fleet, concurrency=8)
        tasks = [asyncio.create_task(dispatcher.route().generate([1, 2], SamplingParams(4))) for _ in range(count)]
        await asyncio.to_thread(meanwhile)
        responses = await asyncio.wait_for(asyncio.gather(*tasks), 20)
        await dispatcher.close()
        return responses, dispatcher.resubmitted

    return asyncio.run(run())


def pushed(fleet: Fleet, version: int = 3) -> None:
    fleet.end_push(fleet.begin_push(), version)


def states(fleet: Fleet) -> list[State]:
    return [member.state for member in fleet.members]


def test_nobody_generates_before_a_push() -> None:
    with serve(lambda body: answer([5])) as url, make_fleet(lambda: [url]) as fleet:
        assert [info.weight_version for info in fleet.meet()] == ["3"]
        assert fleet.choose() is None and not fleet.needs_push()
        pushed(fleet)
        assert fleet.choose() is not None


def test_where_nothing_is_pushed_servers_generate_with_what_they_loaded() -> None:
    with serve(lambda body: answer([5])) as url, make_fleet(lambda: [url], takes_pushes=False) as fleet:
        fleet.meet()
        assert fleet.choose() is not None


@pytest.mark.parametrize("balance", ["least_loaded", "round_robin"])
def test_groups_are_spread_over_all_servers(balance: str) -> None:
    with ExitStack() as stack:
        asked: list[list[Any]] = [[], []]
        urls = [stack.enter_context(serve(lambda body: answer([5]), requests)) for requests in asked]
        fleet = stack.enter_context(make_fleet(lambda: urls, balance=balance))
        fleet.meet()
        pushed(fleet)
        generate(fleet, 6)
        assert [len(requests) for requests in asked] == [3, 3]


def test_a_slow_server_gets_less() -> None:
    slow = threading.Event()
    with ExitStack() as stack:
        fast_requests: list[Any] = []
        urls = [
            stack.enter_context(serve(lambda body: (slow.wait(20), answer([5]))[1])),
            stack.enter_context(serve(lambda body: answer([5]), fast_requests)),
        ]
        fleet = stack.enter_context(make_fleet(lambda: urls))
        fleet.meet()
        pushed(fleet)

        async def run() -> None:
            dispatcher = Dispatcher(fleet, concurrency=8)
            stuck = asyncio.create_task(dispatcher.route().generate([1], SamplingParams(4)))
            await asyncio.sleep(0.2)
            for _ in range(5):
                await dispatcher.route().generate([1], SamplingParams(4))
            slow.set()
            await stuck
            await dispatcher.close()

        asyncio.run(run())
        assert len(fast_requests) == 5


def test_requests_of_a_dead_server_go_to_another() -> None:
    with ExitStack() as stack:
        urls = [
            stack.enter_context(serve(lambda body: Break())),
            stack.enter_context(serve(lambda body: answer([5]))),
        ]
        told: list[str] = []
        fleet = stack.enter_context(make_fleet(lambda: urls, announce=told.append))
        fleet.meet()
        pushed(fleet)
        responses, resubmitted = generate(fleet, 6)
        assert len(responses) == 6 and resubmitted == 3 and fleet.losses == 1
        assert states(fleet) == [State.GONE, State.SERVING]
        assert len(told) == 1 and urls[0] in told[0]


def test_a_server_that_comes_back_waits_for_weights() -> None:
    now, told = "3", list[str]()
    with (
        serve(lambda body: answer([5]), known=lambda path: say_version(now)(path)) as url,
        make_fleet(lambda: [url], announce=told.append) as fleet,
    ):
        fleet.meet()
        pushed(fleet, 3)
        fleet.lost(fleet.members[0], 0, "killed")
        now = "default"  # another process
        with watching(fleet):
            wait_for(fleet.needs_push)
            assert states(fleet) == [State.WAITING] and fleet.members[0].lives == 1
            responses, _ = generate(fleet, meanwhile=lambda: pushed(fleet, 3))
            assert len(responses) == 1
    assert "is back" in told[-1]


def test_a_server_that_was_only_out_of_reach_serves_again_at_once() -> None:
    with serve(lambda body: answer([5])) as url, make_fleet(lambda: [url]) as fleet:
        fleet.meet()
        pushed(fleet, 3)
        fleet.lost(fleet.members[0], 0, "a broken cable")
        with watching(fleet):
            wait_for(lambda: states(fleet) == [State.SERVING])


def test_news_of_an_earlier_life_is_no_news() -> None:
    with serve(lambda body: answer([5])) as url, make_fleet(lambda: [url]) as fleet:
        fleet.meet()
        pushed(fleet)
        fleet.lost(fleet.members[0], 0, "killed")
        fleet.probe(fleet.members[0])
        fleet.lost(fleet.members[0], 0, "killed, says a late request")
        assert states(fleet) == [State.SERVING] and fleet.losses == 1


def test_a_push_finds_out_who_died_and_came_back_while_nobody_looked() -> None:
    now = "3"
    with (
        serve(lambda body: answer([5]), known=lambda path: say_version(now)(path)) as url,
        make_fleet(lambda: [url]) as fleet,
    ):
        fleet.meet()
        pushed(fleet, 3)
        members = fleet.begin_push()
        assert not fleet.find_lost(members, ServerError("an error of another kind"))
        now = "default"  # another process: it is in no group of ours
        assert fleet.find_lost(members, ServerError("no such group"))
        assert fleet.members[0].reason == "it was started again" and fleet.losses == 1
        assert fleet.begin_push() == fleet.members and states(fleet) == [State.WAITING]


def test_a_push_does_not_wait_long_for_a_lost_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "RETURN_SECONDS", 0.2)
    well, asked_in_vain = threading.Event(), threading.Event()

    def known(path: str) -> Any:
        """As SGLang does whose scheduler hangs: only what that one must be asked is not answered."""
        if path == "/server_info":
            (well if well.wait(20) else asked_in_vain).set()
        return KNOWN[path]

    with ExitStack() as stack:
        urls = [stack.enter_context(serve(lambda body: answer([5]), known=k)) for k in (KNOWN.__getitem__, known)]
        stack.callback(well.set)
        fleet = stack.enter_context(make_fleet(lambda: urls))
        well.set()
        fleet.meet()
        pushed(fleet)
        well.clear()
        fleet.lost(fleet.members[1], 0, "it hangs")
        assert [member.url for member in fleet.begin_push()] == urls[:1]
        assert not asked_in_vain.is_set(), "it hangs still"
        well.set()
        assert [member.url for member in fleet.begin_push()] == urls


def test_a_push_begins_anew_where_a_server_was_lost_and_is_back_already() -> None:
    with serve(lambda body: answer([5])) as url, make_fleet(lambda: [url]) as fleet:
        fleet.meet()
        pushed(fleet, 3)
        members = fleet.begin_push()
        fleet.lost(members[0], 0, "killed")
        fleet.probe(members[0])
        assert fleet.find_lost(members, ServerError("a connection broke"))


class OwnServer:
    """A server of ours as the watch sees it; it starts again when it may."""

    def __init__(self, url: str) -> None:
        self.url, self.is_alive, self.starts = url, True, 0
        self.may_start = threading.Event()

    def restart(self) -> None:
        self.starts += 1
        assert self.may_start.wait(20)
        self.is_alive = True

    def log_tail(self) -> str:
        return "its log"


def test_servers_of_ours_are_started_again_each_by_itself() -> None:
    with ExitStack() as stack:
        urls = [stack.enter_context(serve(lambda body: answer([5]))) for _ in range(3)]
        ours = [OwnServer(url) for url in urls[:2]]
        fleet = stack.enter_context(make_fleet(lambda: urls, own={own.url: own for own in ours}))
        fleet.meet()
        pushed(fleet, 3)
        watch = Watch(fleet, hang_timeout=60, max_restarts=1)
        watch.start()
        stack.callback(watch.close)
        ours[0].is_alive = False
        wait_for(lambda: ours[0].starts == 1)
        ours[1].is_alive = False
        wait_for(lambda: ours[1].starts == 1)
        assert states(fleet) == [State.GONE, State.GONE, State.SERVING]
        for own in ours:
            own.may_start.set()
        wait_for(lambda: State.GONE not in states(fleet))
        fleet.progressed()
        for own in ours:
            own.is_alive = False
        wait_for(lambda: [own.starts for own in ours] == [2, 2])
        wait_for(lambda: State.GONE not in states(fleet))
        ours[1].is_alive = False
        wait_for(lambda: fleet.failure is not None)
        with pytest.raises(UserError, match=f"{urls[1]} was lost again .* after 1 restarts"):
            fleet.check()


@pytest.mark.parametrize("says_so", [True, False])
def test_a_server_that_hangs_is_noticed(says_so: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it says that it is not well, as SGLang does after 20 s, or nothing."""
    monkeypatch.setattr(watch_module, "HEALTH_SECONDS", 0.3)
    release = threading.Event()
    healthy = threading.Event()

    def known(path: str) -> Any:
        if path != "/health" or healthy.is_set():
            return KNOWN[path]
        if not says_so:
            release.wait(20)
        return Status(503, "")

    def hang_first(body: dict[str, Any]) -> Any:
        if not healthy.is_set():
            release.wait(20)
        return answer([5])

    with serve(hang_first, known=known) as url, make_fleet(lambda: [url]) as fleet:
        fleet.meet()
        pushed(fleet)

        def meanwhile() -> None:
            wait_for(lambda: fleet.losses == 1)
            assert "hangs" in fleet.members[0].reason
            healthy.set()

        with watching(fleet, hang_timeout=0.3):
            responses, resubmitted = generate(fleet, meanwhile=meanwhile)
        assert not release.is_set(), "the first request hangs there still"
        release.set()
    assert len(responses) == 1 and resubmitted == 1


def test_a_slow_server_that_is_well_is_not_suspected() -> None:
    def slow(body: dict[str, Any]) -> Any:
        time.sleep(1.5)
        return answer([5])

    with serve(slow) as url, make_fleet(lambda: [url]) as fleet:
        fleet.meet()
        pushed(fleet)
        with watching(fleet, hang_timeout=0.3):
            generate(fleet)
        assert fleet.losses == 0


def test_servers_join_and_leave_at_a_push() -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(serve(lambda body: answer([5]))) for _ in range(2))
        now = [first]
        fleet = stack.enter_context(make_fleet(lambda: now))
        fleet.meet()
        pushed(fleet, 3)
        now = [first, second]
        assert [member.url for member in fleet.begin_push()] == [first, second]
        fleet.end_push(fleet.members, 4)
        now = [second]
        pushed(fleet, 5)
        assert [member.url for member in fleet.members] == [second]


def test_who_missed_a_push_waits_for_the_next() -> None:
    with ExitStack() as stack:
        urls = [stack.enter_context(serve(lambda body: answer([5]))) for _ in range(2)]
        fleet = stack.enter_context(make_fleet(lambda: urls))
        fleet.meet()
        fleet.end_push(fleet.members[:1], 4)
        assert states(fleet) == [State.SERVING, State.WAITING] and not fleet.needs_push()


def test_a_push_without_any_server_names_them() -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    fleet = Fleet(lambda: [url], open_member, patience=0.2)
    with pytest.raises(UserError, match=f"no server answers since 0.2 s: {url}: .*gone or unreachable"):
        fleet.begin_push()


def test_a_server_that_does_not_fit_is_an_error_at_the_start_and_left_out_later() -> None:
    def check(url: str, info: ServerInfo) -> None:
        if info.weight_version == "default":
            raise UserError(f"{url} does not fit")

    with ExitStack() as stack:
        good = stack.enter_context(serve(lambda body: answer([5])))
        bad = stack.enter_context(serve(lambda body: answer([5]), known=say_version("default")))
        now, told = [good, bad], list[str]()
        fleet = stack.enter_context(make_fleet(lambda: now, check_info=check, announce=told.append))
        with pytest.raises(UserError, match="does not fit"):
            fleet.meet()
        for _ in range(2):
            assert [member.url for member in fleet.begin_push()] == [good]
        assert told == [f"{bad} does not fit"]


def test_a_request_that_no_server_can_answer_is_an_error() -> None:
    with serve(lambda body: Status(400, "bad")) as url, make_fleet(lambda: [url]) as fleet:
        fleet.meet()
        pushed(fleet)
        with pytest.raises(UserError, match="status 400"):
            generate(fleet)
        assert fleet.losses == 0


def test_the_load_is_a_mean_over_time() -> None:
    meter = LoadMeter()
    meter.change(1)
    meter.change(1)
    time.sleep(0.1)
    meter.change(-2)
    time.sleep(0.1)
    mean, idle = meter.read()
    assert mean == pytest.approx(1.0, abs=0.3) and idle == pytest.approx(0.1, abs=0.05)
    assert meter.read()[0] == 0
