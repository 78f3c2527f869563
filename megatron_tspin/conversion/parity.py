"""The parity gate: the converted policy and transformers must agree on the log-probs of whole responses.

A bit-exact round trip proves nothing about config.json; a wrong rope scaling or window passes it. Only this does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tspin.data.annotated import Example
from megatron_tspin.data.template import PLAIN_TEMPLATE, PromptTemplate
from megatron_tspin.data.tokenizer_loading import load_tokenizer
from megatron_tspin.data.user_examples import read_annotated
from megatron_tspin.errors import ParityError
from megatron_tspin.log import get_logger, track
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.objective.scoring import score_pairs
from megatron_tspin.parallel import Topology
from megatron_tspin.platform import device

_SHOWN = 60
_log = get_logger(__name__)


@dataclass(frozen=True)
class Sentence:
    """A prompt and a response to compare on."""

    text: str
    """How an error message calls it."""
    prompt_ids: list[int]
    response_ids: list[int]


_SENTENCES = (
    ("The capital of France is", " Paris, a city of two million people on the river Seine."),
    ("Question: What is 17 + 25?\nAnswer:", " 17 + 25 = 42."),
    (
        "Water boils at one hundred degrees Celsius at sea level. On a high mountain",
        " the air pressure is lower, so water boils at a lower temperature and food takes longer to cook. This is why "
        "recipes for high places ask for more time, and why a pressure cooker, which does the opposite, saves it.",
    ),
    ("def factorial(n):\n", "    return 1 if n < 2 else n * factorial(n - 1)\n"),
    ("Der Hund", " schläft unter dem Tisch, während es draußen regnet."),
    (
        "A short history of the telegraph. ",
        "Before the telegraph, a message travelled as fast as a horse, a ship or a pigeon. In the eighteenth century "
        "towers with movable arms passed signals from hill to hill across France, as long as the weather was clear. "
        "The electric telegraph of the 1840s changed this: a key closed a circuit, and far away a magnet pulled a pen "
        "against a strip of paper. Within thirty years cables lay on the bed of the Atlantic, and the price of cotton "
        "in Liverpool was known in New York within minutes rather than after two weeks.",
    ),
)


def read_sentences(hf_checkpoint: Path, data: Path | None) -> list[Sentence]:
    """Prompts and responses to compare on, as training encodes them but for the closing EOS.

    Args:
        hf_checkpoint: Its tokenizer encodes the text.
        data: JSONL of annotated examples; None takes built-in sentences.

    Raises:
        InputError: The file is empty or lines cannot be used; all such lines in one message.
    """
    examples = _built_in() if data is None else read_annotated(data)
    template = PromptTemplate(PLAIN_TEMPLATE, load_tokenizer(str(hf_checkpoint)))
    return [
        Sentence(example.prompt + example.response, prompt_ids, response_ids)
        for example, prompt_ids, response_ids in zip(examples, *template.encode(examples, closed=False), strict=True)
    ]


def _built_in() -> list[Example]:
    return [
        Example(id=str(number), prompt=prompt, response=response, record={})
        for number, (prompt, response) in enumerate(_SENTENCES)
    ]


def check_parity(
    model: PolicyModel, topology: Topology, hf_checkpoint: Path, sentences: Sequence[Sentence], bound: float
) -> float:
    """Compares sequence log-probs with transformers on rank 0; returns the largest relative difference.

    transformers computes in float64 (twice the memory of the fp32 weights, on rank 0 only): in fp32 its own rounding
    is larger than the bound on a short, nearly certain response, up to 1.4e-5 on SmolLM2-135M where ours is 1.1e-6.
    The rounding of a logit does not shrink as a response gets more certain, so such responses differ most. Sentences
    are cut to the positions that the model has.

    Raises:
        ParityError: It is above `bound`; names the worst sentence and both values. All ranks raise.
    """
    longest = model.architecture.max_positions
    kept = [sentence for sentence in sentences if len(sentence.prompt_ids) < longest]
    pairs = [(sentence.prompt_ids, sentence.response_ids[: longest - len(sentence.prompt_ids)]) for sentence in kept]
    ours = score_pairs(model, topology, pairs)
    reference = torch.zeros(len(pairs), dtype=torch.float64, device=device())
    if topology.rank == 0:
        reference.copy_(torch.tensor(_transformers_log_probs(hf_checkpoint, pairs), dtype=torch.float64))
    dist.broadcast(reference, src=0)
    theirs: list[float] = reference.tolist()
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(range(len(pairs)), key=differences.__getitem__)
    summary = (
        f"{hf_checkpoint}: largest relative difference of {len(pairs)} sequence log-probs is {differences[worst]:.2e}: "
        f"{ours[worst]:.6f} here, {theirs[worst]:.6f} in transformers, of {kept[worst].text[:_SHOWN]!r}"
    )
    if not differences[worst] <= bound:  # also when it is not a number
        raise ParityError(f"{summary}; that is above the bound of {bound:.2e}, and nothing was written")
    if topology.speaks:
        _log.info("%s; within the bound of %.2e", summary, bound)
    return differences[worst]


@torch.no_grad()
def _transformers_log_probs(folder: Path, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Sequence log-probs by the model that transformers builds from the folder, one row at a time."""
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
    )
    reference = reference.to(device()).eval()
    sums = []
    for prompt, response in track(pairs, "transformers", len(pairs), "sequence"):
        logits = reference(input_ids=torch.tensor([prompt + response], device=device()), use_cache=False).logits[0]
        log_probs = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        targets = torch.tensor(response, device=device())
        sums.append(float(log_probs.gather(1, targets[:, None]).sum()))
    return sums
