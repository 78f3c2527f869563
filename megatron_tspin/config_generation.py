"""How answers are sampled, and by whom."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from megatron_tspin.config_section import Section, execution, report, result


class GenerationSection(Section):
    """How the policy answers the prompts."""

    temperature: float = result(1.0, "--tspin-temperature", "Divides the logits; 0 is greedy.", ge=0)
    top_p: float = result(1.0, "--tspin-top-p", "Smallest set of tokens with this probability.", gt=0, le=1)
    top_k: int = result(0, "--tspin-top-k", "Number of most probable tokens; 0 is all.", ge=0)
    max_new_tokens: int = result(256, "--tspin-max-new-tokens", "Most tokens of a response, EOS included.", ge=1)
    stop: list[str] = result(
        [],
        "--tspin-stop",
        "Where answers end as well as at EOS: token ids (whole numbers) and texts, which stay part of the answer.",
    )
    batch_size: int = execution(64, "--tspin-generation-batch-size", "Prompts answered at once by one replica.", ge=1)
    cache_gib: float | None = execution(
        None,
        "--tspin-generation-cache-gib",
        "GiB of keys and values on each rank; fewer prompts are answered at once if they do not suffice. "
        "Default: half of the memory that is free.",
        gt=0,
    )
    shard_size: int = execution(64, None, "Prompts in one resumable output file.", ge=1)
    tensor_model_parallel_size: int | None = execution(
        None, "--tspin-generation-tensor-model-parallel-size", "TP of generation. Default: training's.", ge=1
    )
    pipeline_model_parallel_size: int | None = execution(
        None,
        "--tspin-generation-pipeline-model-parallel-size",
        "PP of generation. Default: 1 if a policy fits, else training's.",
        ge=1,
    )
    data_parallel_size: int | None = execution(
        None,
        "--tspin-generation-data-parallel-size",
        "DP of generation. Default: what of training's ranks is left.",
        ge=1,
    )
    engine: Literal["megatron", "vllm"] = result(
        "megatron",
        "--tspin-generation-engine",
        "Who answers: megatron (this project's own: the same answers on every machine and layout, and after every "
        "restart), or vllm (faster on GPUs; other answers on another machine or in another try: docs/vllm.md).",
    )
    server_urls: list[str] = execution(
        [],
        "--tspin-server-url",
        "Addresses (scheme, host, port) of vLLM servers that answer, each with the policy that the stage exports. "
        "Default: the stage starts one of its own.",
    )
    server_wait_seconds: float = execution(
        600.0, "--tspin-server-wait-seconds", "How long a rollout waits for a server to serve its policy.", gt=0
    )
    server_timeout_seconds: float = execution(600.0, None, "Most seconds that a server may take for one answer.", gt=0)
    server_retries: int = execution(
        4, None, "How often an answer that failed is asked for again, and a server that is gone is looked for.", ge=0
    )
    vllm_python: str | None = execution(
        None, "--tspin-vllm-python", "Python of the environment that has vLLM. Default: the one that runs this."
    )
    vllm_arguments: list[str] = result([], None, "More options of a vLLM server that the stage starts.")
    request_seeds: bool = result(
        True, None, "Give vLLM a seed with each answer; a server that the stage starts on a CPU never gets any."
    )
    drift_bound: float = report(
        0.1,
        "--tspin-drift-bound",
        "Nats a token (root mean square) that log-probs of vllm may be off from what training computes in fp32; above "
        "it the iteration is refused (exit code 4).",
        gt=0,
    )

    @field_validator("server_urls")
    @classmethod
    def _server_urls_are_some(cls, value: list[str]) -> list[str]:
        for url in value:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"{url!r} is no address of a server; write it as http://host:8000")
            if parts.path.rstrip("/").endswith("/v1"):
                raise ValueError(f"{url!r}: leave out /v1, which is added where vLLM has it")
        plain = [url.rstrip("/") for url in value]
        if len(set(plain)) < len(plain):
            raise ValueError(f"a server is named twice: {', '.join(value)}")
        return plain

    @model_validator(mode="after")
    def _options_have_what_they_need(self) -> "GenerationSection":
        if self.engine == "vllm":
            several = (self.data_parallel_size or 1) > 1
            if several and not self.server_urls:
                raise ValueError(
                    "data_parallel_size above 1 with engine = vllm needs server_urls (--tspin-server-url): a server "
                    "that the stage starts is spread over GPUs by vllm_arguments"
                )
            return self
        if self.server_urls or self.vllm_arguments:
            raise ValueError("server_urls and vllm_arguments need engine = vllm (--tspin-generation-engine)")
        return self
