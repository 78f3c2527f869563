"""Make everything the quickstart needs: tokenizer, initial policy and data, from one seed.

How to run it (three to five minutes on one CPU core, plain torch and transformers, no download)::

    python examples/quickstart/make_checkpoint.py --out examples/quickstart

The task. A prompt names an operation and a string: ``sum 4759``, ``sort 52914`` or ``reverse cabd``. The annotated
response writes the steps down and ends with the answer after the last ``=``: ``4+7=11+5=16+9=25``,
``1<2<4<5<9=12459``, ``d,b,a,c=dbac``. ``scorer.py`` compares the final answers, so the task is verifiable.

The initial policy. Self-play fine-tuning starts from a policy that has met the task, but answers it badly. This one
is pre-trained on an endless *noisy* corpus of the same operations: the longer the string, the more often the corpus
guesses the answer without any step, and a guess is nearly always a lazy one (a rotation for a reversal, one pass of the
sort, the last number forgotten); where it does write the steps down, one of them is sometimes a slip. So the policy
knows how to work an answer out, and mostly does not. The annotated responses always work the answer out and are always
right. That gap, between what the policy could say and what it does say, is what T-SPIN, SPIN and SFT are to close.

No held-out prompt occurs in the annotated data, and neither occurs in the pre-training corpus.
"""

import argparse
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

TEMPLATE = "### Instruction: {prompt}\n\n### Response: "
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
PRINTABLE = "\n" + "".join(chr(code) for code in range(32, 127))
DIGITS = "123456789"
LETTERS = "abcdefgh"
IGNORED = -100
LOG_EVERY = 100
MAX_LENGTH = 128


@dataclass(frozen=True)
class Operation:
    """One family of prompts.

    Attributes:
        name: First word of the prompt, one token.
        alphabet: Characters the argument is drawn from.
        lengths: Possible lengths of the argument.
        repeats: Whether a character may occur twice in the argument.
        steps: The worked-out part of the response, up to and including the last ``=``.
        answer: The right answer.
        lazy: The usual wrong guess.
    """

    name: str
    alphabet: str
    lengths: tuple[int, ...]
    repeats: bool
    steps: Callable[[str], str]
    answer: Callable[[str], str]
    lazy: Callable[[str], str]


@dataclass(frozen=True)
class Noise:
    """How the pre-training corpus differs from the annotated data.

    Attributes:
        guess_share: Share of responses without steps, by length of the argument.
        lazy_share: Share of the guesses that are lazy, so mostly wrong.
        slip_share: Share of the worked-out responses with one wrong character.
    """

    guess_share: tuple[tuple[int, float], ...] = ((2, 0.5), (3, 0.6), (4, 0.7), (5, 0.8))
    lazy_share: float = 0.9
    slip_share: float = 0.25


@dataclass(frozen=True)
class Example:
    """A prompt (without the template) and its response (without EOS)."""

    prompt: str
    response: str


def sum_steps(argument: str) -> str:
    """Return ``4+7=11+5=`` for ``475``: the running total after each number."""
    total, text = int(argument[0]), argument[0]
    for digit in argument[1:]:
        text += f"+{digit}="
        total += int(digit)
        text += str(total)
    return text[: -len(str(total))]


def digit_sum(argument: str) -> str:
    """Return the sum of the digits."""
    return str(sum(map(int, argument)))


def one_sorting_pass(argument: str) -> str:
    """Return the argument after a single pass of bubble sort."""
    characters = list(argument)
    for i in range(len(characters) - 1):
        characters[i : i + 2] = sorted(characters[i : i + 2])
    return "".join(characters)


OPERATIONS = (
    Operation("sum", DIGITS, (2, 3, 4), True, sum_steps, digit_sum, lambda a: digit_sum(a[:-1])),
    Operation(
        "sort",
        DIGITS,
        (3, 4, 5),
        False,
        lambda a: "<".join(sorted(a)) + "=",
        lambda a: "".join(sorted(a)),
        one_sorting_pass,
    ),
    Operation(
        "reverse",
        LETTERS,
        (3, 4, 5),
        True,
        lambda a: ",".join(reversed(a)) + "=",
        lambda a: a[::-1],
        lambda a: a[1:] + a[0],
    ),
)


def draw_question(rng: random.Random) -> tuple[Operation, str]:
    """Draw an operation and its argument."""
    operation = rng.choice(OPERATIONS)
    length = rng.choice(operation.lengths)
    draw = rng.choices(operation.alphabet, k=length) if operation.repeats else rng.sample(operation.alphabet, length)
    return operation, "".join(draw)


def annotated_example(operation: Operation, argument: str) -> Example:
    """Return the expert's response: always worked out, always right."""
    return Example(f"{operation.name} {argument}", operation.steps(argument) + operation.answer(argument))


def slip(text: str, rng: random.Random) -> str:
    """Replace one digit or letter of a response by another of its kind."""
    position = rng.choice([i for i, character in enumerate(text) if character.isalnum()])
    kind = DIGITS if text[position].isdigit() else LETTERS
    return text[:position] + rng.choice(kind.replace(text[position], "")) + text[position + 1 :]


def noisy_example(operation: Operation, argument: str, noise: Noise, rng: random.Random) -> Example:
    """Return what the pre-training corpus says to the same question."""
    annotated = annotated_example(operation, argument)
    if rng.random() < dict(noise.guess_share)[len(argument)]:
        guess = operation.lazy if rng.random() < noise.lazy_share else operation.answer
        return Example(annotated.prompt, guess(argument))
    if rng.random() < noise.slip_share:
        return Example(annotated.prompt, slip(annotated.response, rng))
    return annotated


def draw_annotated(count: int, rng: random.Random) -> list[Example]:
    """Draw annotated examples with pairwise different prompts."""
    examples: dict[str, Example] = {}
    while len(examples) < count:
        example = annotated_example(*draw_question(rng))
        examples.setdefault(example.prompt, example)
    return list(examples.values())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a fast tokenizer: one token per character, one per operation, two for the template.

    The two halves of the template and the names of the operations are added tokens that are *not* special, so decoding
    gives them back. Nothing is added by itself: no BOS, no EOS.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *PRINTABLE])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    head, tail = TEMPLATE.split("{prompt}")
    words = [head, tail, *(f"{operation.name} " for operation in OPERATIONS)]
    backend.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained policy: a two-layer Llama with grouped-query attention and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Tokenize prompt and response separately; the response gets its EOS."""
    prompt_ids = tokenizer(TEMPLATE.format(prompt=example.prompt))["input_ids"]
    response_ids = tokenizer(example.response, add_special_tokens=False)["input_ids"]
    return prompt_ids, [*response_ids, tokenizer.eos_token_id]


def collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad a batch on the right.

    Returns:
        Token ids and next-token labels, both ``[batch, sequence]``; labels are ``IGNORED`` off the response.
    """
    pairs = [encode(example, tokenizer) for example in examples]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), width), IGNORED)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(response)
    return ids, labels


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    excluded_prompts: frozenset[str],
    args: argparse.Namespace,
) -> None:
    """Train the initial policy on the noisy corpus, in place.

    Right padding needs no attention mask here: attention is causal, and the padded positions carry no label.

    Args:
        model: The untrained policy.
        tokenizer: Its tokenizer.
        excluded_prompts: Prompts of the annotated and held-out data, which the corpus must not contain.
        args: ``seed``, ``steps``, ``batch_size`` and ``lr``.
    """
    rng, noise = random.Random(args.seed + 1), Noise()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    for step in tqdm(range(args.steps), desc="pre-training", disable=None):
        questions = [draw_question(rng) for _ in range(args.batch_size)]
        corpus = [noisy_example(operation, argument, noise, rng) for operation, argument in questions]
        ids, labels = collate([example for example in corpus if example.prompt not in excluded_prompts], tokenizer)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % LOG_EVERY == 0:
            logger.info("step %d: loss %.4f", step + 1, loss.item())


def write_jsonl(path: Path, examples: Sequence[Example]) -> None:
    """Write one ``{"id", "prompt", "response"}`` object per line."""
    rows = [
        {"id": f"{path.stem}-{i:04d}", "prompt": example.prompt, "response": example.response}
        for i, example in enumerate(examples)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint/ and the two JSONL files")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--annotated", type=int, default=320, help="number of annotated examples")
    parser.add_argument("--held-out", type=int, default=200, help="number of held-out examples")
    parser.add_argument("--steps", type=int, default=1200, help="pre-training steps")
    parser.add_argument("--batch-size", type=int, default=192, help="pre-training examples per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of pre-training")
    return parser.parse_args()


def main() -> None:
    """Write data and checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    examples = draw_annotated(args.annotated + args.held_out, random.Random(args.seed))
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "annotated.jsonl", examples[: args.annotated])
    write_jsonl(args.out / "held_out.jsonl", examples[args.annotated :])
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    pretrain(model, tokenizer, frozenset(example.prompt for example in examples), args)
    model.save_pretrained(args.out / "checkpoint")
    tokenizer.save_pretrained(args.out / "checkpoint")


if __name__ == "__main__":
    main()
