"""A server that speaks vLLM's protocol as 0.32 does, with answers that follow from the prompt, and with faults."""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERSION = "0.32.0"
VOCABULARY = 101
STOP = 1
MODEL = "policy-0123456789ab"


def answer_to(prompt: list[int], most: int) -> tuple[list[int], list[float]]:
    """Ids, the stop included if it comes within `most`, and the policy's own log-probs."""
    length = 1 + sum(prompt) % 9
    ids = [3 + (sum(prompt) + 7 * place) % (VOCABULARY - 3) for place in range(length)]
    ids = [*ids, STOP][:most]
    return ids, [-0.3 - 0.1 * (token % 7) for token in ids]


class FakeVllm(ThreadingHTTPServer):
    """Listens on a free port of this host, in a thread.

    Attributes:
        faults: What happens to the next completions, one each: "500", "drop" (in the middle of an answer), "garbage",
            "slow", "aborted"; None is none. Those left over after the last are answered well.
        model: The name that it serves.
        change: Alters the choice of an answer before it is sent, given the request.
        asked: Every completion that was asked for.
        answered: How often each prompt was answered whole.
        most_at_once: Completions.
    """

    daemon_threads = True
    request_queue_size = 256  # more clients than that at once lose time by trying again

    def __init__(self, model: str = MODEL, processed: bool = False, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model, self.processed, self.version = model, processed, VERSION
        self.faults: deque[str | None] = deque()
        self.change: Callable[[dict[str, Any], Mapping[str, Any]], None] = lambda choice, request: None
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: Counter[tuple[int, ...]] = Counter()
        self.seconds = 0.0
        self.most_at_once = self._now = 0
        self.release = threading.Event()
        self._guard = threading.Lock()
        self._sockets: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> Any:
        found = super().get_request()
        self._sockets.append(found[0])
        return found

    def die(self) -> None:
        """As a process that is killed: nothing listens, and connections break."""
        self.shutdown()
        self.server_close()
        for each in self._sockets:
            try:
                each.shutdown(2)
            except OSError:
                pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up; that is no error of the test."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with self._guard:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._guard:
                self._now -= 1

    def completion(self, request: dict[str, Any]) -> dict[str, Any]:
        """What vLLM answers."""
        prompt = request["prompt"]
        ids, log_probs = answer_to(prompt, request["max_tokens"])
        stops = request["stop_token_ids"]
        if STOP not in stops:  # as `ignore_eos` has it
            ids, log_probs = (ids * request["max_tokens"])[: request["max_tokens"]], log_probs * request["max_tokens"]
            log_probs = log_probs[: len(ids)]
        if self.processed and request["temperature"] not in (0, 1):
            log_probs = [0.0 if request["top_k"] == 1 else value / request["temperature"] for value in log_probs]
        choice = {
            "index": 0,
            "text": "never the same as the ids",
            "logprobs": {"token_logprobs": log_probs, "tokens": [f"token_id:{token}" for token in ids]},
            "finish_reason": "stop" if ids[-1] in stops else "length",
            "token_ids": ids,
            "prompt_token_ids": prompt,
        }
        self.change(choice, request)
        return {"model": self.model, "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    server: FakeVllm
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, b"")
        elif self.path == "/version":
            self._json(200, {"version": self.server.version})
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": self.server.model}]})
        else:
            self._json(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        with self.server.at_work():  # until the answer is sent: its client may ask again at once
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with self.server._guard:
                self.server.asked.append(request)
                self.server.headers.append(dict(self.headers))
                fault = self.server.faults.popleft() if self.server.faults else None
            time.sleep(self.server.seconds)
            if fault == "slow":
                self.server.release.wait(10)
        if request["model"] != self.server.model:
            self._json(404, {"error": {"message": f"The model `{request['model']}` does not exist."}})
        elif fault == "500":
            self._json(500, {"error": {"message": "EngineCore encountered an issue."}})
        elif fault == "400":
            self._json(400, {"error": {"message": "max_tokens cannot be greater than max_model_len"}})
        elif fault == "garbage":
            self._send(200, b"<html>a proxy</html>")
        else:
            self._answer(request, fault)

    def _answer(self, request: dict[str, Any], fault: str | None) -> None:
        found = self.server.completion(request)
        if fault == "aborted":
            found["choices"][0]["finish_reason"] = "abort"
        content = json.dumps(found).encode()
        if fault == "drop":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
            return
        if fault is None:
            with self.server._guard:
                self.server.answered[tuple(request["prompt"])] += 1
        self._send(200, content)

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def fake_vllm(**options: Any) -> Iterator[FakeVllm]:
    """A server while the block lasts."""
    server = FakeVllm(**options)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.die()
        thread.join()
