"""Answers to many prompts as shard files, so that an interrupted generation redoes only the shards it was in.

A shard holds a fixed range of the prompts and is written when all its answers are there; its digest lies beside it. Its
ids depend on neither slots nor layout, so these may change when a folder is continued; its size in prompts does not.
Shards are spread over DP.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.errors import ArtifactError, StoppedError
from megatron_tspin.generation.backends.backend import Answer, Backend, PromptRequest
from megatron_tspin.generation.sampling import Decoding, answer_seed
from megatron_tspin.heartbeat import beat
from megatron_tspin.log import get_logger, progress_bar
from megatron_tspin.parallel import (
    Topology,
    any_rank,
    any_rank_of_policy,
    on_first_rank,
    refuse_stale_facts,
    wait_for_all_ranks,
)
from megatron_tspin.records import Response, read_records
from megatron_tspin.run_folder import shard_digest, shard_path, shard_paths, shard_settings
from megatron_tspin.stop_request import heeded, stop_requested
from megatron_tspin.storage import read_json, read_text, sha256_file, sha256_text, write_json, write_text

_log = get_logger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer."""

    id: str
    ids: Sequence[int]
    sample: int = 0
    """Number of the answer among those wanted to this prompt."""


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompts: In document order.
        decoding: How to choose tokens.
        seed: Of the run.
        purpose: Part of the key of the randomness.
        shard_size: Prompts in a file.
        facts: What the answers depend on besides (checkpoint, tokenizer, template); kept in `settings.json`.
    """

    prompts: Sequence[Prompt]
    decoding: Decoding
    seed: int
    purpose: str
    shard_size: int
    facts: dict[str, Any]

    def shards(self) -> list[Sequence[Prompt]]:
        """The prompts of each shard."""
        return [self.prompts[i : i + self.shard_size] for i in range(0, len(self.prompts), self.shard_size)]

    def settings(self) -> dict[str, Any]:
        """Everything that decides the answers, and how they are spread over the shards."""
        decoding = vars(self.decoding)
        return {**self.facts, **decoding, "seed": self.seed, "purpose": self.purpose, "shard_size": self.shard_size,
                "prompts": len(self.prompts), "prompts_sha256": self._fingerprint()}  # fmt: skip

    def continued_in(self, folder: Path) -> "Request":
        """The request with the shard size that a folder was begun with, if it was.

        Raises:
            ArtifactError: The folder's `settings.json` has none.
        """
        path = shard_settings(folder)
        if not path.is_file():
            return self
        before = read_json(path)
        size = before.get("shard_size") if isinstance(before, dict) else None
        if not isinstance(size, int) or size < 1:
            raise ArtifactError(f"{path}: not the settings of generated shards; remove the folder {folder}")
        return replace(self, shard_size=size)

    def _fingerprint(self) -> str:
        """Hex SHA-256 of the ids and tokens of all prompts."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.id, list(prompt.ids), *[prompt.sample] * bool(prompt.sample)]).encode())
        return digest.hexdigest()


def generate_shards(
    asked: Request, backend: Backend, topology: Topology, tokenizer: Tokenizer, folder: Path
) -> Request:
    """Generates the shards that are not there yet; when a rank returns, all of them are.

    Returns:
        By what `read_shards` reads them: a folder that was begun with another shard size is finished with that one.

    Raises:
        ArtifactError: The folder holds answers that were made with other settings, or a rank has read other prompts.
        StoppedError: A stop was requested while shards were left to make.
    """
    size = on_first_rank(lambda: asked.continued_in(folder).shard_size, topology)
    request = replace(asked, shard_size=size)
    if size != asked.shard_size and topology.speaks:
        _log.info("%s: was begun with %d prompts a shard and keeps that", folder, size)
    shards, settings = request.shards(), request.settings()
    refuse_stale_facts(f"{folder} ({request.purpose})", settings, topology)
    pending = on_first_rank(lambda: _pending(folder, settings, len(shards)), topology)
    mine = pending[topology.dp_rank :: topology.dp_size]
    if len(pending) < len(shards) and topology.speaks:
        _log.info("%s: %d of %d shards are already there", folder, len(shards) - len(pending), len(shards))
    sink = _Sink(request, mine, topology, tokenizer, folder)
    with heeded(), progress_bar(request.purpose, sink.answers_left, "answer", topology.speaks) as bar:
        stopped = _stop_is_asked(topology)
        if mine and not stopped:
            beat(request.purpose)
            with closing(backend.answers(sink.requests(), request.decoding)) as answers:
                for index, answer in answers:
                    bar.update(1)
                    if sink.take(index, answer):
                        beat(f"{request.purpose}, {len(mine) - sink.shards_left} of {len(mine)} shards written")
                        stopped = sink.answers_left > 0 and _stop_is_asked(topology)
                        if stopped:
                            break
        wait_for_all_ranks()
    if any_rank(stopped, topology):
        raise StoppedError(
            f"stopped as {stop_requested() or 'another rank was'} asked: the whole shards of {request.purpose} are kept"
        )
    return request


def _stop_is_asked(topology: Topology) -> bool:
    return any_rank_of_policy(stop_requested() is not None, topology)


class _Sink:
    """Takes answers in any order; writes a shard when its last answer is there."""

    def __init__(
        self, request: Request, numbers: Sequence[int], topology: Topology, tokenizer: Tokenizer, folder: Path
    ) -> None:
        shards = request.shards()
        self._request, self._topology, self._tokenizer, self._folder = request, topology, tokenizer, folder
        self._prompts = {number: shards[number] for number in numbers}
        self._answers: dict[int, dict[int, Answer]] = {number: {} for number in numbers}

    @property
    def answers_left(self) -> int:
        """Answers that are not in a shard that was written."""
        return sum(map(len, self._prompts.values()))

    @property
    def shards_left(self) -> int:
        """Shards that were not written."""
        return len(self._prompts)

    def requests(self) -> list[PromptRequest]:
        """Shard after shard, so that few are begun at a time."""
        seed, purpose, size = self._request.seed, self._request.purpose, self._request.shard_size
        return [
            PromptRequest(number * size + place, prompt.ids, answer_seed(seed, purpose, prompt.id, prompt.sample))
            for number, prompts in self._prompts.items()
            for place, prompt in enumerate(prompts)
        ]

    def take(self, index: int, answer: Answer) -> bool:
        """Keeps an answer; returns whether that completed its shard."""
        number, place = divmod(index, self._request.shard_size)
        prompts, answers = self._prompts[number], self._answers[number]
        answers[place] = answer
        if len(answers) < len(prompts):
            return False
        if self._topology.is_output_rank:
            lines = [_response(prompt, answers[i], self._tokenizer).line() for i, prompt in enumerate(prompts)]
            _write_shard(shard_path(self._folder, number), "".join(lines))
        del self._prompts[number], self._answers[number]
        return True


def _pending(folder: Path, settings: dict[str, Any], count: int) -> list[int]:
    """Numbers of the shards that are not there yet, of a folder that is bound to these settings.

    The folder is listed: had a network file system been asked for a single absent file, it might remember the absence
    for a while after another node has written the file.
    """
    _bind(folder, settings)
    there = {path.name for path in folder.iterdir()}
    return [number for number in range(count) if not _is_whole(shard_path(folder, number), there)]


def _write_shard(path: Path, text: str) -> None:
    """The digest comes last: a shard without one is made again, to the same answers."""
    write_text(path, text)
    write_text(shard_digest(path), sha256_text(text) + "\n")


def _is_whole(path: Path, there: Collection[str]) -> bool:
    """Whether a shard is there, and just as it was written.

    Args:
        path: The shard.
        there: Names of the folder's files.
    """
    if path.name not in there or shard_digest(path).name not in there:
        return False
    whole = sha256_file(path) == read_text(shard_digest(path)).strip()
    if not whole:
        _log.warning("%s: was changed since it was written; its answers are made again", path)
    return whole


def _bind(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses to mix answers made with different settings."""
    path = shard_settings(folder)
    if not path.is_file():
        write_json(path, settings)
        return
    before = read_json(path)
    changed = [
        f"{key} was {before.get(key)!r}, now {value!r}" for key, value in settings.items() if before.get(key) != value
    ]
    if changed:
        raise ArtifactError(
            f"{folder}: holds answers made with other settings ({'; '.join(changed)}); remove the folder, or add "
            "--overwrite where the command has it"
        )


def remove_shards(folder: Path) -> None:
    """Removes all answers of a folder, and what binds them, but nothing that this module does not write."""
    for path in (*shard_paths(folder), *map(shard_digest, shard_paths(folder)), shard_settings(folder)):
        path.unlink(missing_ok=True)


def _response(prompt: Prompt, answer: Answer, tokenizer: Tokenizer) -> Response:
    return Response(
        id=prompt.id,
        response_ids=answer.ids,
        token_log_probs=answer.log_probs,
        ended=answer.ended,
        ended_by=answer.ids[-1] if answer.ended else None,
        text=tokenizer.decode(answer.ids),
        sample=prompt.sample,
    )


def read_shards(request: Request, folder: Path) -> list[Response]:
    """All answers, in the order of the prompts.

    Raises:
        ArtifactError: A shard is missing, torn, changed, or answers other prompts; names the file.
    """
    responses: list[Response] = []
    for number, prompts in enumerate(request.shards()):
        path = shard_path(folder, number)
        found = list(read_records(path, Response))
        if [(response.id, response.sample) for response in found] != [(prompt.id, prompt.sample) for prompt in prompts]:
            raise ArtifactError(f"{path}: its answers are not those to this run's prompts; remove the file")
        if sha256_file(path) != read_text(shard_digest(path)).strip():
            raise ArtifactError(f"{path}: was changed since it was written; remove the file, then it is made again")
        responses += found
    return responses
