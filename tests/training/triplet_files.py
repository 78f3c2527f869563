"""The data files of an iteration, with tokens that tell where they belong."""

from megatron_tspin.data.annotated import Example, write_examples
from megatron_tspin.data.indexed import write_documents
from megatron_tspin.objective.batches import Triplet
from megatron_tspin.objective.roles import ROLES
from megatron_tspin.run_folder import TRAIN, RunFolder, document_stem, examples_path
from megatron_tspin.training.triplet_source import TripletSource

FACTS = {"tokenizer_fingerprint": "t", "template_fingerprint": "p", "examples_sha256": "e"}
LENGTHS = [
    (4, 3, 5, 2),
    (2, 30, 9, 12),
    (6, 1, 1, 1),
    (3, 8, 8, 8),
    (5, 4, 60, 4),
    (7, 2, 2, 2),
    (1, 6, 7, 8),
    (9, 5, 5, 5),
]
"""Tokens of the prompt, y, y' and y0 of each example; the second and the fifth are long."""


def document(example: int, role: int, length: int) -> list[int]:
    """Tokens of a prompt (role 0) or of a response (1 to 3)."""
    return [(11 * example + 3 * role + place) % 100 for place in range(length)]


def expected(example: int, role: str, length: int | None = None) -> list[int]:
    """A response, or its first `length` tokens."""
    number = ROLES.index(role) + 1
    return document(example, number, LENGTHS[example][number])[:length]


def all_of(source: TripletSource) -> list[Triplet]:
    """Every triplet, in document order."""
    return [source.triplet(index) for index in range(len(source.ids))]


def write_triplets(folder: RunFolder, iteration: int) -> None:
    """Writes the examples and the documents of all roles."""
    where = (folder.data, folder.data, folder.iteration(iteration), folder.data)
    for number, (key, place) in enumerate(zip(("prompt", *ROLES), where, strict=True)):
        place.mkdir(parents=True, exist_ok=True)
        documents = [document(i, number, lengths[number]) for i, lengths in enumerate(LENGTHS)]
        write_documents(document_stem(place, TRAIN, key), documents, 101, FACTS)
    examples = [Example(id=f"ex-{i}", prompt="p", response="r", record={}) for i in range(len(LENGTHS))]
    write_examples(examples_path(folder.data, TRAIN), examples)
