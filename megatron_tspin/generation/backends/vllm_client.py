"""What is said to a vLLM server, and what of its answers is believed.

vLLM speaks OpenAI's protocol with fields of its own (`/v1/completions` with `prompt` as token ids, `return_token_ids`,
`return_tokens_as_token_ids`; vLLM 0.10.2 and newer). Token ids go in; token ids and log-probs come out. Text is never
read: made of the same ids it may be tokenised into others. Every parameter of sampling is sent, because a server takes
those that are not from the checkpoint's generation_config.json.
"""

import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_tspin.errors import DivergenceError, InputError
from megatron_tspin.generation.sampling import Decoding

_HEALTH_SECONDS = 10.0
"""Most for a question that a server answers without its engine."""
_MAY_PASS = frozenset({404, 408, 409, 425, 429})
"""Status codes besides 5xx that another server, or another try, may not answer with; 404: of another policy."""
_FORBIDDEN = frozenset({401, 403})
_NO_LOG_PROB = -9999.0
"""What vLLM writes for minus infinity."""
_ROUNDING = 1e-3
"""A log-prob may be above 0 by so much."""
_PROBE_TOKENS = 8
_RAW_DIFFERENCE = 0.1
"""Nats between log-probs of one token that are no rounding; those of a truncated distribution are 0."""
_PIECE = 2**16


class ServerFault(Exception):
    """A server did not answer, or not this time; another one, or the next try, may."""


@dataclass(frozen=True)
class Completion:
    """What a server says: ids of an answer, the stop included, their log-probs, and whether a stop ended it."""

    ids: list[int]
    log_probs: list[float]
    stopped: bool


@dataclass(frozen=True)
class Wanted:
    """One answer as a server is asked for it.

    Attributes:
        prompt: Token ids.
        decoding: How to choose tokens.
        stops: Ids at which it ends.
        seed: Of its randomness; None leaves that to the engine.
        vocab_size: Ids of the answer are below.
    """

    prompt: Sequence[int]
    decoding: Decoding
    stops: frozenset[int]
    seed: int | None
    vocab_size: int

    def body(self, model: str) -> dict[str, Any]:
        """The request for a server that serves the policy under this name."""
        decoding = self.decoding
        seeded = {} if self.seed is None else {"seed": self.seed % 2**63}
        return {
            "model": model,
            "prompt": [int(token) for token in self.prompt],
            "add_special_tokens": False,
            "n": 1,
            "max_tokens": decoding.max_new_tokens,
            "min_tokens": 0,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(self.stops),
            "ignore_eos": True,  # the server's own idea of it: ours is among the stops
            "logprobs": 0,  # of the chosen tokens alone
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **seeded,
        }


class Server:
    """One vLLM server. Threads may ask it at the same time.

    Args:
        url: As `http://host:8000`.
        model: Name under which it has to serve the policy.
        seconds: Most that an answer may take.
        key: What it asks for as its API key, if anything.
    """

    def __init__(self, url: str, model: str, seconds: float, key: str | None = None) -> None:
        self.url = url
        self._model = model
        self._seconds = seconds
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()

    def version(self) -> str:
        """Of its vLLM.

        Raises:
            ServerFault: It does not answer.
            InputError: It is no vLLM.
        """
        found = self._ask("GET", "/version", seconds=_HEALTH_SECONDS)
        version = found.get("version")
        if not isinstance(version, str):
            raise InputError(f"{self.url}: does not say which vLLM it is (GET /version); is it a vLLM server?")
        return version

    def check_policy(self) -> None:
        """Demands that it is up and serves the policy.

        Raises:
            ServerFault: It does not answer, or serves another one, such as that of the previous iteration.
        """
        self._ask("GET", "/health", seconds=_HEALTH_SECONDS, parsed=False)
        found = self._ask("GET", "/v1/models", seconds=_HEALTH_SECONDS).get("data")
        names = [each.get("id") for each in found if isinstance(each, dict)] if isinstance(found, list) else []
        if self._model not in names:
            raise ServerFault(f"serves {', '.join(map(str, names)) or 'nothing'} instead of {self._model}")

    def complete(self, wanted: Wanted) -> Completion:
        """One answer.

        Raises:
            ServerFault: It did not come; nothing of it is there.
            InputError: The request is refused, or what came is not what was asked for.
            DivergenceError: A log-prob is not finite.
        """
        found = self._ask("POST", "/v1/completions", wanted.body(self._model))
        if found.get("model") != self._model:
            raise ServerFault(f"answered as {found.get('model')} instead of {self._model}")
        choices = found.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._refused("one answer was asked for, and there is not just one")
        return self._completion(choices[0], wanted)

    def hang_up(self) -> None:
        """Closes all connections: whoever waits for an answer gets a `ServerFault`, and the server stops working."""
        with self._guard:
            for each in self._open:
                with suppress(OSError):  # it is closed already
                    each.shutdown(socket.SHUT_RDWR)

    def _refused(self, what: str) -> InputError:
        return InputError(
            f"{self.url}: {what}; answers are taken from vLLM 0.10.2 and newer, whose /v1/completions returns token "
            "ids with their log-probs"
        )

    def _completion(self, choice: Mapping[str, Any], wanted: Wanted) -> Completion:
        """What a choice says, if it is what was asked for."""
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise ServerFault(f"gave an answer up (finish_reason {reason})")
        ids, prompt = choice.get("token_ids"), choice.get("prompt_token_ids")
        if not _are_ids(ids, wanted.vocab_size) or not isinstance(ids, list):
            raise self._refused("an answer has no token ids of the policy's vocabulary (token_ids)")
        if prompt is not None and list(prompt) != list(wanted.prompt):
            raise self._refused("a prompt was not taken as it was sent (prompt_token_ids differ)")
        most = wanted.decoding.max_new_tokens
        if len(ids) > most:
            raise self._refused(f"an answer has {len(ids)} tokens, and at most {most} were asked for")
        stopped = reason == "stop"
        if stopped and ids[-1] not in wanted.stops:
            raise self._refused(f"an answer ends at token {ids[-1]} as if that were a stop, which it is not")
        if not stopped and len(ids) < most:
            raise self._refused(f"an answer was cut at {len(ids)} of {most} tokens: raise the server's --max-model-len")
        return Completion(list(ids), self._log_probs(choice, ids), stopped)

    def _log_probs(self, choice: Mapping[str, Any], ids: Sequence[int]) -> list[float]:
        found = choice.get("logprobs")
        values = found.get("token_logprobs") if isinstance(found, dict) else None
        tokens = found.get("tokens") if isinstance(found, dict) else None
        if not isinstance(values, list) or len(values) != len(ids) or not all(map(_is_number, values)):
            raise self._refused("an answer lacks log-probs of its tokens (token_logprobs)")
        if tokens != [f"token_id:{token}" for token in ids]:
            raise self._refused("log-probs are of other tokens than those of the answer (tokens, token_ids)")
        log_probs = [float(value) for value in values]
        if not all(math.isfinite(value) and value > _NO_LOG_PROB for value in log_probs):
            raise DivergenceError(
                f"{self.url}: log-probs of an answer are not finite: the policy's weights hold NaN or infinity, or its "
                "number format overflows"
            )
        if max(log_probs) > _ROUNDING:
            raise self._refused(f"an answer has a log-prob of {max(log_probs):.3g}, which is above 0")
        return [min(value, 0.0) for value in log_probs]

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        parsed: bool = True,
    ) -> dict[str, Any]:
        """The JSON object that a path answers with; {} if it is not to be parsed."""
        content = None if body is None else json.dumps(body).encode()
        status, answer = self._exchange(method, path, content, min(seconds or self._seconds, self._seconds))
        if status != 200:
            self._refuse_status(path, status, answer)
        if not parsed:
            return {}
        try:
            found = json.loads(answer)
        except ValueError as error:
            raise ServerFault(f"{path}: no JSON but {answer[:80]!r}") from error
        if not isinstance(found, dict):
            raise ServerFault(f"{path}: no JSON object but {answer[:80]!r}")
        return found

    def _refuse_status(self, path: str, status: int, answer: bytes) -> None:
        said = f"{path}: status {status}: {_message(answer)}"
        if status in _FORBIDDEN:
            raise InputError(f"{self.url}: {said}; set VLLM_API_KEY to the server's key")
        if status >= 500 or status in _MAY_PASS:
            raise ServerFault(said)
        raise InputError(f"{self.url}: {said}")

    def _exchange(self, method: str, path: str, body: bytes | None, seconds: float) -> tuple[int, bytes]:
        """Status and content of an answer, all of which has to come within so many seconds."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=seconds)
        deadline = time.monotonic() + seconds
        try:
            connection.connect()
            with self._listed(connection.sock):
                connection.request(method, parts.path.rstrip("/") + path, body, self._headers)
                response = connection.getresponse()
                pieces = []
                while piece := response.read1(_PIECE):
                    pieces.append(piece)
                    if time.monotonic() > deadline:
                        raise TimeoutError
                if response.length:  # read1 ends in silence where the connection does
                    raise ServerFault(f"{path}: the connection broke within an answer")
                return response.status, b"".join(pieces)
        except TimeoutError as error:
            raise ServerFault(f"{path}: no answer within {seconds:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerFault(f"{path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()

    @contextmanager
    def _listed(self, open_socket: socket.socket) -> Iterator[None]:
        """Lets `hang_up` know of it: the connection itself forgets its socket before an answer is read."""
        with self._guard:
            self._open.add(open_socket)
        try:
            yield
        finally:
            with self._guard:
                self._open.discard(open_socket)


def refuse_processed(server: Server, prompts: Sequence[Sequence[int]], most: int, vocab_size: int) -> bool:
    """Demands that a server gives log-probs of the policy itself, before temperature and truncation.

    The same most probable tokens are asked for twice: greedily, where no server changes anything, and as the only ones
    left by top-k at another temperature, where changed log-probs are 0.

    Args:
        server: It.
        prompts: To ask with, until one tells.
        most: New tokens that they have room for.
        vocab_size: The policy's.

    Returns:
        Whether that could be told; a policy that is sure of every token has log-probs of 0 either way.

    Raises:
        InputError: It gives others.
        ServerFault: It does not answer.
    """
    count = min(most, _PROBE_TOKENS)
    greedy = Decoding(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=count)
    narrow = Decoding(temperature=0.5, top_p=0.5, top_k=1, max_new_tokens=count)
    for prompt in prompts:
        plain, changed = (
            server.complete(Wanted(prompt, each, frozenset(), None, vocab_size)) for each in (greedy, narrow)
        )
        told = False
        for one, other, expected, found in zip(plain.ids, changed.ids, plain.log_probs, changed.log_probs, strict=True):
            if one != other:  # two tokens as probable as each other; what follows cannot be compared
                break
            if abs(expected - found) > _RAW_DIFFERENCE:
                raise InputError(
                    f"{server.url}: log-probs depend on temperature, top-p or top-k (token {one}: {expected:.4g} "
                    f"greedily, {found:.4g} at temperature 0.5 with top-k 1), so they are not the policy's; start it "
                    "with --logprobs-mode raw_logprobs"
                )
            told = told or expected < -_RAW_DIFFERENCE
        if told:
            return True
    return False


def _are_ids(value: object, vocab_size: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size for token in value)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _message(answer: bytes) -> str:
    """What an error says, as vLLM writes it."""
    text = answer.decode("utf-8", errors="replace")
    try:
        found = json.loads(text)
        text = found["error"]["message"]
    except (ValueError, TypeError, KeyError):
        pass
    return " ".join(str(text).split())[:300]
