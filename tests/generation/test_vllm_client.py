"""What is believed of a vLLM server, and that requests are answered once whatever happens to servers."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from megatron_tspin.errors import DivergenceError, InputError, StageError, TspinError
from megatron_tspin.generation.backends import vllm_servers
from megatron_tspin.generation.backends.vllm_client import Completion, Server, ServerFault, Wanted, refuse_processed
from megatron_tspin.generation.backends.vllm_servers import ServerPool, pause, wait_for_servers
from megatron_tspin.generation.sampling import Decoding
from tests.generation.fake_vllm import MODEL, STOP, VOCABULARY, FakeVllm, answer_to, fake_vllm

PLAIN = Decoding(temperature=0.8, top_p=0.9, top_k=5, max_new_tokens=6)
PROMPTS = [[3 + i, *[5] * (i % 4)] for i in range(40)]
Start = Callable[..., FakeVllm]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(fake_vllm(**options))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_servers, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(vllm_servers, "_LOOK_SECONDS", 0.05)


def wanted(prompt: list[int], **changes: Any) -> Wanted:
    given: dict[str, Any] = {"decoding": PLAIN, "stops": frozenset([STOP]), "seed": None, "vocab_size": VOCABULARY}
    return Wanted(prompt, **{**given, **changes})


def server_of(fake: FakeVllm, seconds: float = 20.0, **options: Any) -> Server:
    return Server(fake.url, MODEL, seconds, **options)


def expected(prompt: list[int]) -> Completion:
    ids, log_probs = answer_to(prompt, PLAIN.max_new_tokens)
    return Completion(ids, log_probs, ids[-1] == STOP)


def ask_all(fakes: list[FakeVllm], retries: int = 4, slots: int = 4, seconds: float = 20.0) -> dict[int, Completion]:
    """Answers to `PROMPTS` by their numbers, each of which came once."""
    pool = ServerPool([server_of(fake, seconds) for fake in fakes], slots, retries)
    found = [item for item in pool.answers([(7 * i, wanted(ids)) for i, ids in enumerate(PROMPTS)]) if item]
    assert Counter(index for index, _ in found) == Counter({7 * i: 1 for i in range(len(PROMPTS))})
    return dict(found)


def check_all(found: dict[int, Completion]) -> None:
    for number, prompt in enumerate(PROMPTS):
        one, other = found[7 * number], expected(prompt)
        assert (one.ids, one.stopped) == (other.ids, other.stopped)
        assert one.log_probs == pytest.approx(other.log_probs)


def test_token_ids_go_in_and_come_out(start: Start) -> None:
    fake = start()
    found = server_of(fake, key="secret").complete(wanted([4, 5, 6], seed=2**100 + 5))
    assert found == expected([4, 5, 6])
    (asked,) = fake.asked
    assert asked["prompt"] == [4, 5, 6] and asked["return_token_ids"] and asked["seed"] == 5
    assert not asked["add_special_tokens"] and asked["ignore_eos"] and asked["stop_token_ids"] == [STOP]
    assert fake.headers[0]["Authorization"] == "Bearer secret"


def test_every_parameter_of_sampling_is_sent(start: Start) -> None:
    """Those that are not, vLLM takes from generation_config.json."""
    fake = start()
    server_of(fake).complete(wanted([4]))
    sampling = {
        "temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "max_tokens": 6, "min_tokens": 0, "n": 1,
    }  # fmt: skip
    assert sampling.items() <= fake.asked[0].items() and "seed" not in fake.asked[0]


def test_a_response_of_ids_and_text_is_read_by_its_ids(start: Start) -> None:
    """What a text becomes when it is tokenised again may be other ids."""
    fake = start()
    fake.change = lambda choice, request: choice.update(text="\ufffd")
    assert server_of(fake).complete(wanted([4])).ids == expected([4]).ids


def spoil(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda choice, request: choice.update(values)


def of_log_probs(change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any], Any], None]:
    def spoilt(choice: dict[str, Any], request: Any) -> None:
        choice["logprobs"]["token_logprobs"] = change(choice["logprobs"]["token_logprobs"])

    return spoilt


def longer(choice: dict[str, Any], request: Any) -> None:
    ids = [5] * (request["max_tokens"] + 1)
    choice.update(token_ids=ids, finish_reason="length")


def cut(choice: dict[str, Any], request: Any) -> None:
    choice.update(token_ids=choice["token_ids"][:-1], finish_reason="length")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(token_ids=None), "an answer has no token ids"),
        (spoil(token_ids=[]), "an answer has no token ids"),
        (spoil(token_ids=[VOCABULARY]), "an answer has no token ids of the policy's vocabulary"),
        (spoil(logprobs=None), "an answer lacks log-probs"),
        (of_log_probs(lambda values: [None, *values[1:]]), "an answer lacks log-probs"),
        (of_log_probs(lambda values: values[1:]), "an answer lacks log-probs"),
        (of_log_probs(lambda values: [0.5, *values[1:]]), "a log-prob of 0.5, which is above 0"),
        (longer, "an answer has 7 tokens, and at most 6 were asked for"),
        (cut, r"an answer was cut at \d of 6 tokens: raise the server's --max-model-len"),
        (spoil(finish_reason="stop", token_ids=[4, 9]), "ends at token 9 as if that were a stop"),
        (spoil(prompt_token_ids=[2, 4]), "a prompt was not taken as it was sent"),
    ],
)
def test_what_was_not_asked_for_is_refused(
    change: Callable[[dict[str, Any], Any], None], message: str, start: Start
) -> None:
    fake = start()
    fake.change = change
    with pytest.raises(InputError, match=message) as caught:
        server_of(fake).complete(wanted([4]))
    assert fake.url in str(caught.value)


def test_log_probs_of_other_tokens_are_refused(start: Start) -> None:
    fake = start()
    fake.change = lambda choice, request: choice["logprobs"].update(tokens=["a"] * len(choice["token_ids"]))
    with pytest.raises(InputError, match="log-probs are of other tokens"):
        server_of(fake).complete(wanted([4]))


@pytest.mark.parametrize("value", [-9999.0, float("nan")], ids=str)
def test_a_log_prob_that_is_not_finite_is_no_bad_input(value: float, start: Start) -> None:
    fake = start()
    fake.change = of_log_probs(lambda values: [value, *values[1:]])
    with pytest.raises(DivergenceError, match="log-probs of an answer are not finite"):
        server_of(fake).complete(wanted([4]))


def test_log_probs_after_temperature_and_truncation_are_refused(start: Start) -> None:
    """As at a server started with --logprobs-mode processed_logprobs."""
    raw, processed = start(), start(processed=True)
    assert refuse_processed(server_of(raw), PROMPTS[:2], 6, VOCABULARY)
    with pytest.raises(InputError, match="depend on temperature, top-p or top-k .* --logprobs-mode raw_logprobs"):
        refuse_processed(server_of(processed), PROMPTS[:2], 6, VOCABULARY)


def test_log_probs_that_temperature_scales_are_refused(start: Start) -> None:
    fake = start()

    def scaled(choice: dict[str, Any], request: Any) -> None:
        by = request["temperature"] or 1.0
        choice["logprobs"]["token_logprobs"] = [value / by for value in choice["logprobs"]["token_logprobs"]]

    fake.change = scaled
    with pytest.raises(InputError, match="depend on temperature"):
        refuse_processed(server_of(fake), PROMPTS[:1], 6, VOCABULARY)


def test_a_policy_that_is_sure_of_everything_does_not_tell(start: Start) -> None:
    fake = start(processed=True)
    fake.change = of_log_probs(lambda values: [0.0] * len(values))
    assert not refuse_processed(server_of(fake), PROMPTS[:2], 6, VOCABULARY)


def test_weights_of_the_previous_iteration_are_not_asked(start: Start) -> None:
    old, new = start(model="policy-ffffffffffff"), start()
    with pytest.raises(ServerFault, match=f"serves policy-ffffffffffff instead of {MODEL}"):
        server_of(old).check_policy()
    with pytest.raises(ServerFault, match="status 404"):
        server_of(old).complete(wanted([4]))
    servers = [server_of(old), server_of(new)]
    assert ready_of(servers, 0.2) == servers[1:]
    with pytest.raises(
        InputError, match=r"no vLLM server serves the policy after 0.2 s(.|\n)*instead of(.|\n)*do this"
    ):
        ready_of(servers[:1], 0.2)


def ready_of(servers: list[Server], seconds: float) -> list[Server]:
    waiting = wait_for_servers(servers, seconds, None, "do this")
    while True:
        try:
            next(waiting)
        except StopIteration as done:
            found: list[Server] = done.value
            return found


def test_a_server_that_starts_late_is_waited_for(start: Start) -> None:
    fake = start(model="policy-ffffffffffff")

    def other_policy() -> None:
        fake.model = MODEL

    timer = threading.Timer(0.3, other_policy)
    timer.start()
    assert len(ready_of([server_of(fake)], 20.0)) == 1
    timer.join()


def test_what_a_server_is_told_by_a_person_who_named_the_wrong_one(start: Start) -> None:
    fake = start()
    fake.version = ""
    assert server_of(fake).version() == ""
    with pytest.raises(ServerFault, match="/version: ConnectionRefusedError"):
        Server("http://127.0.0.1:9", MODEL, 1.0).version()


def test_all_servers_are_used_and_none_has_more_than_its_slots(start: Start) -> None:
    fakes = [start(), start()]
    for fake in fakes:
        fake.seconds = 0.02
    check_all(ask_all(fakes, slots=3))
    assert all(1 < fake.most_at_once <= 3 for fake in fakes)
    assert sum(fake.answered.total() for fake in fakes) == len(PROMPTS)


@pytest.mark.parametrize("fault", ["500", "drop", "garbage", "aborted"])
def test_what_fails_is_asked_for_again(fault: str, start: Start) -> None:
    fake = start()
    chance = random.Random(fault)
    fake.faults.extend(chance.choice([fault, None, None]) for _ in range(60))
    check_all(ask_all([fake], retries=20))
    assert fake.answered.total() == len(PROMPTS) < len(fake.asked)


def test_an_answer_that_takes_too_long_is_asked_for_again(start: Start) -> None:
    fake = start()
    fake.faults.extend(["slow"] * 3)
    check_all(ask_all([fake], seconds=0.5))
    assert len(fake.asked) >= len(PROMPTS) + 3, "more on a machine that takes half a second for any other"


def test_one_that_always_fails_ends_it_and_says_why(start: Start) -> None:
    fake = start()
    fake.faults.extend(["500"] * 1000)
    with pytest.raises(
        StageError, match=r"failed 3 times on servers that are well, the last time: .*status 500: Engine"
    ):
        ask_all([fake], retries=2)


def test_a_request_that_is_refused_is_not_repeated(start: Start) -> None:
    fake = start()
    fake.faults.extend(["400"] * 1000)
    with pytest.raises(InputError, match="status 400: max_tokens cannot be greater than max_model_len"):
        ask_all([fake], slots=1)
    assert len(fake.asked) == 1


def test_requests_of_a_server_that_dies_go_to_the_others(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    dying, other = start(), start()
    dying.seconds = other.seconds = 0.02
    timer = threading.Timer(0.1, dying.die)
    timer.start()
    with caplog.at_level("WARNING", logger="megatron_tspin"):
        check_all(ask_all([dying, other], retries=2))
    timer.join()
    assert dying.answered.total() < len(PROMPTS)


def test_when_all_are_gone_each_is_named(start: Start) -> None:
    fakes = [start(), start()]
    for fake in fakes:
        fake.seconds = 0.05
    timers = [threading.Timer(0.1, fake.die) for fake in fakes]
    for timer in timers:
        timer.start()
    with pytest.raises(StageError, match="no vLLM server is left") as caught:
        ask_all(fakes, retries=2)
    assert all(fake.url in str(caught.value) for fake in fakes) and "the same command continues" in str(caught.value)


def test_a_server_that_is_given_other_weights_is_taken_out(start: Start) -> None:
    changed, other = start(), start()
    changed.seconds = other.seconds = 0.02

    def reload() -> None:
        changed.model = "policy-ffffffffffff"

    timer = threading.Timer(0.1, reload)
    timer.start()
    check_all(ask_all([changed, other], retries=2))
    timer.join()


def test_who_stops_taking_answers_leaves_nothing_running(start: Start) -> None:
    fake = start()
    fake.faults.extend([None, *["slow"] * 100])
    before = threading.active_count()
    pool = ServerPool([server_of(fake)], 8, 4)
    answers = pool.answers([(i, wanted(ids)) for i, ids in enumerate(PROMPTS)])
    while next(answers) is None:
        pass
    began = time.monotonic()
    answers.close()
    assert time.monotonic() - began < 4.0
    threads = [each for each in threading.enumerate() if each.name == fake.url]
    assert not threads and threading.active_count() >= before
    assert len(fake.asked) < len(PROMPTS)


def test_while_there_is_no_answer_the_caller_is_told(start: Start) -> None:
    fake = start()
    fake.seconds = 0.3
    pool = ServerPool([server_of(fake)], 1, 0)
    found = list(pool.answers([(0, wanted([4]))]))
    assert found[:2] == [None, None] and found[-1] == (0, expected([4]))


def test_pauses_grow() -> None:
    assert [pause(attempt) for attempt in range(3)] == [0.01, 0.02, 0.04] and pause(50) == 30.0


def test_nothing_is_asked_of_nobody(start: Start) -> None:
    assert list(ServerPool([server_of(start())], 2, 0).answers([])) == []


def test_errors_that_end_it_are_the_projects(start: Start) -> None:
    fake = start()
    fake.change = spoil(token_ids=None)
    with pytest.raises(TspinError):
        ask_all([fake])
