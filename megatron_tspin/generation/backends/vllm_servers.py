"""Requests spread over vLLM servers, each answered once whatever happens to a server.

Each server has threads of its own that take the next request, so that a fast one does more. A request that failed goes
back to the head of the queue: at once if its server is gone, after a pause if the server is well. Only a whole answer
takes a request off the list, so none is lost; and a thread owns its request until then, so none comes twice.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from megatron_tspin.errors import InputError, StageError, TspinError
from megatron_tspin.generation.backends.vllm_client import Completion, Server, ServerFault, Wanted
from megatron_tspin.log import get_logger

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
GRACE_SECONDS = 30.0
"""For further servers, once one is ready."""
_LOOK_SECONDS = 1.0
_LEAVE_SECONDS, _HANG_UP_SECONDS = 5.0, 0.05

_log = get_logger(__name__)


def pause(attempt: int) -> float:
    """Seconds before try number `attempt`, from 0: twice as long each time."""
    return float(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE))


def wait_for_servers(
    servers: Sequence[Server], seconds: float, check: Callable[[], None] | None, remedy: str, grace: float = 0.0
) -> Generator[None, None, list[Server]]:
    """The servers that serve the policy, as soon as all do or no more are waited for; yields while it waits.

    Args:
        servers: All of them.
        seconds: How long to wait for the first.
        check: Called all the time; may raise.
        remedy: What a person can do if none does.
        grace: Seconds for the others, once one is ready.

    Raises:
        InputError: None serves it; names what each said.
    """
    ready: list[Server] = []
    deadline = time.monotonic() + seconds
    said = dict.fromkeys((server.url for server in servers), "")
    while True:
        for server in servers:
            if server not in ready and _serves(server, said):
                ready.append(server)
                deadline = min(deadline, time.monotonic() + grace)
        if len(ready) == len(servers):
            return ready
        if time.monotonic() > deadline:
            break
        if check is not None:
            check()
        yield
        time.sleep(min(_LOOK_SECONDS, seconds))
    lines = [f"  {url}: {what}" for url, what in said.items() if what]
    if not ready:
        raise InputError("\n".join([f"no vLLM server serves the policy after {seconds:g} s:", *lines, f"  {remedy}"]))
    _log.warning("answers come from %d of %d servers:\n%s", len(ready), len(servers), "\n".join(lines))
    return ready


def _serves(server: Server, said: dict[str, str]) -> bool:
    try:
        server.check_policy()
    except ServerFault as fault:
        said[server.url] = str(fault)
        return False
    said[server.url] = ""
    return True


@dataclass(eq=False)
class _Job:
    """A request on its way."""

    index: int
    wanted: Wanted
    not_before: float = 0.0
    failures: int = 0
    """Tries that failed on a server that was well."""
    losses: int = 0
    """Tries whose server was gone."""


@dataclass(eq=False)
class _Member:
    """A server of the pool."""

    server: Server
    guard: threading.Lock = field(default_factory=threading.Lock)
    dead: bool = False
    fault: str = ""
    """What was wrong the last time."""
    well_at: float = 0.0


class ServerPool:
    """Servers that share requests; one that is gone stays left out.

    Args:
        servers: Ready ones.
        slots: Requests under way at each.
        retries: How often a request that failed is tried again, and a server that is gone is looked for.
    """

    def __init__(self, servers: Sequence[Server], slots: int, retries: int) -> None:
        self._members = [_Member(server) for server in servers]
        self._slots, self._retries = slots, retries

    def answers(self, wanted: Sequence[tuple[int, Wanted]]) -> Generator[tuple[int, Completion] | None]:
        """Each index with its answer as soon as that is there, in any order; None about once a second besides.

        Raises:
            StageError: A request failed too often, or all servers are gone.
            InputError: A server refuses a request, or answers something else than was asked for.
            DivergenceError: A log-prob is not finite.
        """
        if wanted:
            yield from _Round(self._members, wanted, self._retries).answers(min(self._slots, len(wanted)))


class _Round:
    """The requests of one call, of which a thread that is late leaves nothing to the next one.

    Args:
        members: The servers.
        wanted: Requests by index.
        retries: See `ServerPool`.
    """

    def __init__(self, members: Sequence[_Member], wanted: Sequence[tuple[int, Wanted]], retries: int) -> None:
        self._members, self._retries = members, retries
        self._changed = threading.Condition()
        self._waiting = deque(_Job(index, each) for index, each in wanted)
        self._outstanding = len(wanted)
        self._stopped = False
        self._results: queue.SimpleQueue[tuple[int, Completion] | TspinError] = queue.SimpleQueue()

    def answers(self, slots: int) -> Generator[tuple[int, Completion] | None]:
        """See `ServerPool.answers`."""
        threads = [
            threading.Thread(target=self._work, args=(member,), name=member.server.url, daemon=True)
            for member in self._members
            for _ in range(slots)
            if not member.dead
        ]
        if not threads:
            raise self._all_gone()
        left = self._outstanding  # before a thread can answer the first one
        try:
            for thread in threads:
                thread.start()
            while left:
                try:
                    found = self._results.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(found, TspinError):
                    raise found
                left -= 1
                yield found
        finally:
            self._leave(threads)

    def _leave(self, threads: Sequence[threading.Thread]) -> None:
        """Ends the threads; answers that are not complete are given up."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        left = [thread for thread in threads if thread.is_alive()]
        deadline = time.monotonic() + _LEAVE_SECONDS
        while left and time.monotonic() < deadline:
            for member in self._members:  # again and again: a thread may have been about to send its request
                member.server.hang_up()
            left[0].join(_HANG_UP_SECONDS)
            left = [thread for thread in left if thread.is_alive()]

    def _work(self, member: _Member) -> None:
        """What a thread does: one request after the other, while its server lives."""
        try:
            while (job := self._take(member)) is not None:
                began = time.monotonic()
                try:
                    completion = member.server.complete(job.wanted)
                except ServerFault as fault:
                    if self._stopped:
                        return
                    member.fault = str(fault)
                    well = self._is_well(member)
                    self._give_back(job, member, well)
                    if not well and not self._comes_back(member, began):
                        return
                else:
                    self._deliver(job, completion)
        except TspinError as error:
            self._fail(error)
        except Exception as error:  # a thread that dies in silence would leave its request unanswered for ever
            self._fail(StageError(f"{member.server.url}: {type(error).__name__}: {error}"))

    def _take(self, member: _Member) -> _Job | None:
        """The next request; None when this thread is no longer needed."""
        with self._changed:
            while not self._stopped and not member.dead and self._outstanding:
                now = time.monotonic()
                for job in self._waiting:
                    if job.not_before <= now:
                        self._waiting.remove(job)
                        return job
                soonest = min((job.not_before for job in self._waiting), default=None)
                self._changed.wait(None if soonest is None else soonest - now)
        return None

    def _deliver(self, job: _Job, completion: Completion) -> None:
        with self._changed:
            if self._stopped:
                return
            self._outstanding -= 1
            if not self._outstanding:
                self._changed.notify_all()
        self._results.put((job.index, completion))

    def _give_back(self, job: _Job, member: _Member, well: bool) -> None:
        """Puts a request that failed to the head of the queue.

        Raises:
            StageError: It failed as often as may be.
        """
        job.failures, job.losses = job.failures + well, job.losses + (not well)
        url = member.server.url
        if job.failures > self._retries:
            raise StageError(
                f"{url}: an answer failed {job.failures} times on servers that are well, the last time: "
                f"{member.fault}; see the server's log, or raise generation.server_timeout_seconds or server_retries"
            )
        if job.losses > self._retries + len(self._members):
            raise StageError(
                f"{url}: servers went away {job.losses} times while they worked at one answer; see their logs"
            )
        job.not_before = time.monotonic() + pause(job.failures - 1) if well else 0.0
        with self._changed:
            self._waiting.appendleft(job)
            self._changed.notify_all()

    def _is_well(self, member: _Member) -> bool:
        try:
            member.server.check_policy()
        except ServerFault as fault:
            member.fault = str(fault)
            return False
        return True

    def _comes_back(self, member: _Member, began: float) -> bool:
        """Whether a server that was gone is there again; one thread looks, with growing pauses, the others wait.

        Args:
            member: The server.
            began: When the request was sent that failed.
        """
        with member.guard:
            if member.dead or member.well_at > began:
                return not member.dead
            for attempt in range(self._retries):
                if self._stopped_within(pause(attempt)):
                    return False
                if self._is_well(member):
                    member.well_at = time.monotonic()
                    return True
            self._bury(member)
            return False

    def _stopped_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._stopped and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._stopped

    def _bury(self, member: _Member) -> None:
        with self._changed:
            member.dead = True
            self._changed.notify_all()
        if all(each.dead for each in self._members):
            self._fail(self._all_gone())
        else:
            _log.warning("%s is gone (%s): the other servers take its requests", member.server.url, member.fault)

    def _all_gone(self) -> StageError:
        lines = [f"  {member.server.url}: {member.fault}" for member in self._members]
        remedy = "  the whole shards are kept; start a server again, then the same command continues"
        return StageError("\n".join(["no vLLM server is left:", *lines, remedy]))

    def _fail(self, error: TspinError) -> None:
        with self._changed:
            stopped, self._stopped = self._stopped, True
            self._changed.notify_all()
        if not stopped:
            self._results.put(error)
