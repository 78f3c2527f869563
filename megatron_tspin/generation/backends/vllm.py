"""vLLM answers: a server that the stage starts, or servers that are named by their addresses.

A weaker promise than that of our own engine: what is sampled depends on vLLM's version, its kernels, the machine, and
on what else is answered at the time. Training scores a sample of it again (`training/rescoring.py`).
"""

import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tspin.checkpoint.hf_weights import export_hf
from megatron_tspin.config import Config
from megatron_tspin.config_generation import GenerationSection
from megatron_tspin.data.stops import Stops
from megatron_tspin.errors import InputError, StageError, TspinError
from megatron_tspin.generation.backends.backend import Answer, PromptRequest
from megatron_tspin.generation.backends.vllm_client import Completion, Server, ServerFault, Wanted, refuse_processed
from megatron_tspin.generation.backends.vllm_process import Serving, VllmProcess, python_of, version_of
from megatron_tspin.generation.backends.vllm_servers import GRACE_SECONDS, ServerPool, wait_for_servers
from megatron_tspin.generation.sampling import Decoding
from megatron_tspin.heartbeat import beat
from megatron_tspin.log import LOG_FILE_VARIABLE, get_logger
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology, on_first_rank
from megatron_tspin.platform import has_cuda
from megatron_tspin.run_folder import engine_log

_GIB = 2**30
_PROBES = 4
"""Prompts that a server may be asked with for whether its log-probs are the policy's."""
_SEEDS = 2**31
_KEY = "VLLM_API_KEY"

_log = get_logger(__name__)


def serve_policy(
    config: Config, model: PolicyModel, topology: Topology, checkpoint_sha256: str, folder: Path
) -> Serving:
    """Exports the policy for servers, once, in the number format that generation computes in. All ranks call it.

    Args:
        config: The run.
        model: This rank's part of the policy.
        topology: The layout.
        checkpoint_sha256: Of the checkpoint; part of the name that servers have to serve.
        folder: Where exports lie; one of the same policy that is there is taken.
    """
    bf16 = config.precision.bf16
    name = f"policy-{checkpoint_sha256[:12]}" + ("-bf16" if bf16 else "")
    target = (folder / name).absolute()
    if not on_first_rank(target.is_dir, topology):
        source = Path(config.model.hf_checkpoint)
        export_hf(model, topology, source, target, torch.bfloat16 if bf16 else torch.float32, link=True)
    return Serving(target, name, "bfloat16" if bf16 else "float32", config.data.seq_length)


def remove_served(folder: Path) -> None:
    """Removes exports that no server needs any more; they can be made again."""
    shutil.rmtree(folder, ignore_errors=True)


class VllmBackend:
    """See `Backend`. One rank of each replica talks to the servers and tells the others.

    Args:
        settings: The run's.
        serving: What is to be served.
        topology: The layout; all ranks make one of these together.
        stops: Where an answer ends.
        vocab_size: The policy's.

    Raises:
        InputError: There is no vLLM, no server serves the policy in time, or servers are of different versions.
    """

    def __init__(
        self, settings: GenerationSection, serving: Serving, topology: Topology, stops: Stops, vocab_size: int
    ) -> None:
        self._settings, self._serving, self._topology = settings, serving, topology
        self._stops, self._vocab_size = stops, vocab_size
        self._pool: ServerPool | None = None
        self._process: VllmProcess | None = None
        self._seeds = settings.request_seeds and (bool(settings.server_urls) or has_cuda())
        version = on_first_rank(self._find_version, topology)
        if topology.speaks:
            _log.info(
                "vLLM %s answers: what it samples depends on the machine, and on what else it answers at the time; an "
                "answer that is made again is another one (docs/vllm.md)", version,
            )  # fmt: skip
        self.facts: dict[str, Any] = {
            "engine": "vllm",
            "engine_version": version,
            "engine_settings": {
                "dtype": serving.dtype,
                "log_probs": "raw",
                "seeds": "answer" if self._seeds else "engine",
                "arguments": settings.vllm_arguments,
            },
        }

    def answers(self, requests: Sequence[PromptRequest], decoding: Decoding) -> Generator[tuple[int, Answer]]:
        """See `Backend.answers`.

        Raises:
            StageError: No server is left, or an answer failed too often.
            InputError: What a server says cannot be used.
            DivergenceError: A log-prob is not finite.
        """
        if not requests:
            return
        with closing(self._told(requests, decoding)) as told:
            for found in told:
                beat()
                if found is not None:
                    yield found

    def close(self) -> None:
        """Ends a server that the stage started."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _told(self, requests: Sequence[PromptRequest], decoding: Decoding) -> Generator[tuple[int, Answer] | None]:
        """What the talking rank hears, on every rank of the replica."""
        group = self._topology.model_parallel_group
        if group.size() == 1:
            yield from self._heard(requests, decoding)
            return
        if group.rank() > 0:
            while True:
                told: list[Any] = [None]
                dist.broadcast_object_list(told, group=group, group_src=0)
                if isinstance(told[0], TspinError):
                    raise told[0]
                if told[0] is StopIteration:
                    return
                yield told[0]
        with closing(self._heard(requests, decoding)) as heard:
            while True:
                try:
                    found: Any = next(heard, StopIteration)
                except TspinError as error:
                    found = error
                dist.broadcast_object_list([found], group=group, group_src=0)
                if isinstance(found, TspinError):
                    raise found
                if found is StopIteration:
                    return
                yield found

    def _heard(self, requests: Sequence[PromptRequest], decoding: Decoding) -> Generator[tuple[int, Answer] | None]:
        """Answers as servers give them; None about once a second while there is none."""
        if self._pool is None:
            self._pool = yield from self._make_pool(requests, decoding)
        wanted = [(request.index, self._wanted(request, decoding)) for request in requests]
        with closing(self._pool.answers(wanted)) as answers:
            for found in answers:
                if found is None:
                    if self._process is not None:
                        self._process.check()
                    yield None
                else:
                    index, completion = found
                    yield index, self._answer(completion)

    def _make_pool(self, requests: Sequence[PromptRequest], decoding: Decoding) -> Generator[None, None, ServerPool]:
        settings = self._settings
        if not settings.server_urls:
            self._process = self._start(requests[0])
        ready = yield from self._ready()
        prompts = [request.ids for request in requests[:_PROBES]]
        faults = {server.url: self._fault_of(server, prompts, decoding.max_new_tokens) for server in ready}
        usable = [server for server in ready if faults[server.url] is None]
        lines = "\n".join(f"  {url}: {fault}" for url, fault in faults.items() if fault is not None)
        if not usable:
            raise StageError(f"no vLLM server answers:\n{lines}")
        if lines:
            _log.warning("answers come without servers that fail:\n%s", lines)
        return ServerPool(usable, settings.batch_size, settings.server_retries)

    def _fault_of(self, server: Server, prompts: Sequence[Sequence[int]], most: int) -> str | None:
        """What is wrong with a server that may pass; None if it answers as it has to.

        Raises:
            InputError: It never will.
        """
        try:
            if (version := server.version()) != self.facts["engine_version"]:
                raise InputError(
                    f"{server.url}: has vLLM {version}, and these answers are begun with {self.facts['engine_version']}"
                )
            told = refuse_processed(server, prompts, most, self._vocab_size)
        except ServerFault as fault:
            return str(fault)
        if not told:
            _log.warning(
                "%s: the policy is too sure of its answers to tell whether log-probs are its own or those after "
                "temperature and truncation; only rescoring will", server.url,
            )  # fmt: skip
        return None

    def _start(self, first: PromptRequest) -> VllmProcess:
        """A server of the stage's own.

        Its seed is another one for each purpose, and for what is left after an interruption: y0 must not be sampled by
        the same random numbers as y'.
        """
        settings = self._settings
        arguments = list(settings.vllm_arguments)
        if settings.cache_gib is not None:
            arguments += ["--kv-cache-memory-bytes", str(int(settings.cache_gib * _GIB))]
        stage_log = os.environ.get(LOG_FILE_VARIABLE)
        log = engine_log(Path(stage_log) if stage_log else self._serving.folder)
        python = python_of(settings.vllm_python)
        return VllmProcess(python, self._serving, first.seed % _SEEDS, settings.batch_size, arguments, log)

    def _ready(self, grace: float = 0.0) -> Generator[None, None, list[Server]]:
        """The servers that serve the policy; waits for them."""
        settings, process = self._settings, self._process
        urls = [process.url] if process is not None else settings.server_urls
        key = os.environ.get(_KEY)
        servers = [Server(url, self._serving.name, settings.server_timeout_seconds, key) for url in urls]
        remedy = f"serve it there (docs/vllm.md): {self._serving.shown()}"
        check = None if process is None else process.check
        ready = yield from wait_for_servers(servers, settings.server_wait_seconds, check, remedy, grace)
        return ready

    def _find_version(self) -> str:
        """Of the vLLM that will answer; of named servers, once one serves the policy."""
        if not self._settings.server_urls:
            return version_of(python_of(self._settings.vllm_python))
        _log.info("servers have to serve the policy now: %s", self._serving.shown())
        waiting = self._ready(GRACE_SECONDS)
        while True:
            try:
                next(waiting)
                beat("waiting for vLLM servers")
            except StopIteration as done:
                ready: list[Server] = done.value
                break
        try:
            versions = {server.url: server.version() for server in ready}
        except ServerFault as fault:
            raise StageError(f"a vLLM server that was well does not say its version: {fault}") from fault
        if len(set(versions.values())) > 1:
            found = ", ".join(f"{url}: {version}" for url, version in versions.items())
            raise InputError(f"the servers have different versions of vLLM, which answer differently: {found}")
        return next(iter(versions.values()))

    def _wanted(self, request: PromptRequest, decoding: Decoding) -> Wanted:
        seed = request.seed if self._seeds else None
        return Wanted(request.ids, decoding, self._stops.ids, seed, self._vocab_size)

    def _answer(self, completion: Completion) -> Answer:
        """What is left where texts end answers too, of which a server knows nothing."""
        answer = Answer()
        for token, log_prob in zip(completion.ids, completion.log_probs, strict=True):
            answer.ids.append(token)
            answer.log_probs.append(log_prob)
            answer.ended = self._stops.end(answer.ids)
            if answer.ended:
                break
        return answer
