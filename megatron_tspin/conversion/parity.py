"""The parity gate: the converted policy and transformers must agree, layer by layer and on log-probs of responses.

A bit-exact round trip proves nothing about config.json; a wrong rope scaling or window passes it. Only this does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tspin.conversion.reference import Reference, references
from megatron_tspin.data.annotated import Example
from megatron_tspin.data.template import PLAIN_TEMPLATE, PromptTemplate
from megatron_tspin.data.tokenizer import Tokenizer
from megatron_tspin.data.tokenizer_loading import load_tokenizer
from megatron_tspin.data.user_examples import read_annotated
from megatron_tspin.errors import ParityError
from megatron_tspin.log import get_logger, track
from megatron_tspin.models.architecture import Architecture
from megatron_tspin.models.policy import PolicyModel
from megatron_tspin.objective.scoring import score_alone
from megatron_tspin.parallel import Topology, on_first_rank
from megatron_tspin.platform import device, has_cuda
from megatron_tspin.provenance import commit, versions
from megatron_tspin.records import ComparedLogProb, Verification

LOG_PROB_BOUND = 5e-6
"""Largest relative difference of a sequence log-prob, fp32."""
HIDDEN_BOUND = 2e-5
"""Largest relative difference of a layer's states over a sequence, fp32: norm of the difference over the norm."""
_SHOWN = 60
_LONG = 256
_BEYOND = 64
_MOST_ON_CPU, _MOST_ON_CUDA = 1024, 16384
"""Tokens of the long sequence: its attention's squares are computed in float64."""
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


def read_sentences(hf_checkpoint: Path, data: Path | None, tokenizer: Tokenizer | None = None) -> list[Sentence]:
    """Prompts and responses to compare on, as training encodes them but for the closing EOS.

    Args:
        hf_checkpoint: Its tokenizer encodes the text, unless there is another.
        data: JSONL of annotated examples; None takes built-in sentences.
        tokenizer: Encodes the text.

    Raises:
        InputError: The file is empty or lines cannot be used; all such lines in one message.
    """
    examples = _built_in() if data is None else read_annotated(data)
    template = PromptTemplate(PLAIN_TEMPLATE, tokenizer or load_tokenizer(str(hf_checkpoint)))
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
    model: PolicyModel,
    topology: Topology,
    hf_checkpoint: Path,
    sentences: Sequence[Sentence],
    bound: float = LOG_PROB_BOUND,
) -> Verification:
    """Compares sequence log-probs and what each layer returns with transformers, all ranks together.

    The judge is `reference.references`, in float64: in fp32 its own rounding is larger than the bound on a short,
    nearly certain response, up to 1.4e-5 on SmolLM2-135M where ours is 1.1e-6. The rounding of a logit does not shrink
    as a response gets more certain, so such responses differ most. Sentences are cut to the positions that the model
    has, and all of them together, repeated, make one that is longer than a window (as far as its squares fit).

    Args:
        model: This rank's part, in fp32.
        topology: The layout.
        hf_checkpoint: The folder that it was loaded from.
        sentences: What to compare on.
        bound: Largest relative difference of a sequence log-prob.

    Raises:
        ParityError: It is larger, or a layer's states differ by more than `HIDDEN_BOUND`. Names the worst sentence with
            both values, and the first layer that departs. All ranks raise.
    """
    architecture = model.architecture
    compared = _fitting(sentences, architecture)
    pairs = [(sentence.prompt_ids, sentence.response_ids) for sentence in compared]
    judged: list[Reference] = []  # stays empty on other ranks, which are sent a layer at a time
    on_first_rank(lambda: judged.extend(references(hf_checkpoint, pairs, architecture.num_layers)), topology)
    states = _Captured(model)
    ours, squares = [], torch.zeros(2, len(pairs), architecture.num_layers, dtype=torch.float64, device=device())
    try:
        for number, pair in enumerate(track(pairs, "compare", len(pairs), "sequence", topology.speaks)):
            score, positions = score_alone(model, topology, pair)
            ours.append(score)
            for layer in range(architecture.num_layers):
                expected = _from_rank_0(
                    judged, number, layer, (len(pair[0]) + len(pair[1]) - 1, architecture.hidden_size)
                )
                squares[:, number, layer] = states.squares(layer, positions, expected)
    finally:
        states.close()
    dist.all_reduce(squares)
    theirs = on_first_rank(lambda: [float(reference.log_probs.sum()) for reference in judged], topology)
    found = Verification(
        sentences=[
            ComparedLogProb(
                text=sentence.text[:_SHOWN],
                prompt_tokens=len(prompt),
                response_tokens=len(response),
                ours=here,
                transformers=there,
            )
            for sentence, (prompt, response), here, there in zip(compared, pairs, ours, theirs, strict=True)
        ],
        layers=(squares[0] / squares[1]).sqrt().amax(dim=0).tolist(),
        log_prob_bound=bound,
        hidden_bound=HIDDEN_BOUND,
        shortest_window=architecture.shortest_window,
        layout=f"TP {topology.tp_size}, CP {topology.cp_size}, PP {topology.pp_size}, DP {topology.dp_size}",
        family=architecture.family,
        versions=versions(),
        commit=commit(),
    )
    if not found.holds:
        raise ParityError(f"{hf_checkpoint}: {found.summary()}; nothing was written")
    if topology.speaks:
        _log.info("%s: %s", hf_checkpoint, found.summary())
    return found


def _fitting(sentences: Sequence[Sentence], architecture: Architecture) -> list[Sentence]:
    """Those that the model has positions for, cut, and a long one."""
    most = architecture.max_positions
    kept = [
        Sentence(sentence.text, sentence.prompt_ids, sentence.response_ids[: most - len(sentence.prompt_ids)])
        for sentence in sentences
        if len(sentence.prompt_ids) < most
    ]
    ids = [token for sentence in kept for token in (*sentence.prompt_ids, *sentence.response_ids)]
    window = architecture.shortest_window or 0
    longest = min(most, max(_LONG, window + _BEYOND), _MOST_ON_CUDA if has_cuda() else _MOST_ON_CPU)
    row = (ids * (longest // len(ids) + 1))[:longest]
    return [*kept, Sentence(f"all of these, repeated to {longest} tokens", row[:1], row[1:])]


def _from_rank_0(judged: list[Reference], number: int, layer: int, shape: tuple[int, int]) -> Tensor:
    """What a layer of the judge returned, fp32 [positions, h], on every rank."""
    if judged:
        expected = judged[number].hidden[layer].to(device())
    else:
        expected = torch.empty(shape, device=device())
    dist.broadcast(expected, src=0)
    return expected


class _Captured:
    """What each layer of this rank returned last."""

    def __init__(self, model: PolicyModel) -> None:
        self._states: dict[int, Tensor] = {}
        self._hooks = [layer.register_forward_hook(self._keep) for layer in model.decoder.layers]

    def _keep(self, layer: Any, _inputs: Any, output: Any) -> None:
        self._states[layer.layer_number - 1] = output[0][:, 0]

    def squares(self, layer: int, positions: Tensor, expected: Tensor) -> Tensor:
        """Sums of squares of the difference and of what is expected, float64 [2], over this rank's positions."""
        if layer not in self._states:
            return torch.zeros(2, dtype=torch.float64, device=device())
        real = (positions < len(expected)).to(device())
        wanted = expected[positions.to(device())[real]].double()
        difference = self._states[layer][real].double() - wanted
        return torch.stack((difference.square().sum(), wanted.square().sum()))

    def close(self) -> None:
        """Takes the hooks away."""
        for hook in self._hooks:
            hook.remove()
