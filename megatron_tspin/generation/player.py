"""A loaded policy that is ready to answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tspin.checkpoint.policies import load_policy
from megatron_tspin.config import Config, ParallelSection
from megatron_tspin.data.problems import listed
from megatron_tspin.data.stops import stops_of_run
from megatron_tspin.data.template import PromptTemplate
from megatron_tspin.data.tokenization import load_run_tokenizer
from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.errors import InputError
from megatron_tspin.generation.backends.backend import Backend
from megatron_tspin.generation.backends.cache_size import cache_size
from megatron_tspin.generation.backends.engine import Engine
from megatron_tspin.generation.backends.vllm import VllmBackend, serve_policy
from megatron_tspin.generation.sampling import Decoding
from megatron_tspin.generation.shards import Prompt, Request, generate_shards
from megatron_tspin.models.hf_config import read_architecture
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.parallel import Topology
from megatron_tspin.storage import sha256_file


@dataclass(frozen=True)
class Player:
    """A policy with its tokenizer and the run's way of decoding.

    Attributes:
        facts: What its answers depend on besides decoding and prompts; stored beside them.
    """

    config: Config
    topology: Topology
    model: PolicyModel
    backend: Backend
    tokenizer: Tokenizer
    template: PromptTemplate
    facts: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Real tokens of the policy's vocabulary."""
        size: int = self.model.architecture.vocab_size
        return size

    def decoding(self, greedy: bool = False) -> Decoding:
        """How the run chooses tokens."""
        settings = self.config.generation
        return Decoding(
            temperature=0.0 if greedy else settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_new_tokens=settings.max_new_tokens,
        )

    def answer(self, prompts: Sequence[Prompt], purpose: str, folder: Path, greedy: bool = False) -> Request:
        """Answers prompts into the shards that are not there yet; returns what `read_shards` reads them by."""
        settings = self.config.generation
        request = Request(
            prompts=prompts,
            decoding=self.decoding(greedy),
            seed=self.config.seed,
            purpose=purpose,
            shard_size=settings.shard_size,
            facts=self.facts,
        )
        return generate_shards(request, self.backend, self.topology, self.tokenizer, folder)

    def check_lengths(self, prompts: Sequence[Prompt], source: Path) -> None:
        """Refuses prompts that leave no room for an answer; all of them in one message."""
        room = self.config.data.seq_length - self.config.generation.max_new_tokens
        long = [f"{prompt.id} ({len(prompt.ids)} tokens)" for prompt in prompts if len(prompt.ids) > room]
        if long:
            raise InputError(
                f"{source}: prompts of more than seq_length - max_new_tokens = {room} tokens: {listed(long)}; "
                f"raise --seq-length or lower --tspin-max-new-tokens"
            )


def load_player(config: Config, layout: ParallelSection, topology: Topology, checkpoint: Path, serving: Path) -> Player:
    """Loads a checkpoint in the generation layout.

    Args:
        config: The run.
        layout: Of generation.
        topology: This rank's place in it.
        checkpoint: The policy.
        serving: Folder for exports of it, where servers answer.
    """
    architecture = read_architecture(Path(config.model.hf_checkpoint))
    architecture.check_layout(layout)
    tokenizer = load_run_tokenizer(config)
    template = PromptTemplate(config.data.template, tokenizer)
    model = load_policy(architecture, layout, config.training, config.precision.without_fp8(), topology, checkpoint)
    model.eval()
    facts: dict[str, Any] = {
        "checkpoint_sha256": sha256_file(checkpoint / "manifest.json"),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "template_fingerprint": template.fingerprint,
    }
    settings = config.generation
    if settings.stop:
        facts["stop"] = settings.stop
    stops = stops_of_run(settings.stop, tokenizer)
    backend: Backend
    if settings.engine == "vllm":
        served = serve_policy(config, model, topology, facts["checkpoint_sha256"], serving)
        backend = VllmBackend(settings, served, topology, stops, architecture.vocab_size)
    else:
        size = cache_size(model, topology, settings.batch_size, settings.cache_gib)
        backend = Engine(model, topology, stops, size)
    facts |= backend.facts
    return Player(config, topology, model, backend, tokenizer, template, facts)
