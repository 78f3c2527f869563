"""The responses of each role beside their prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tspin.data.indexed import Documents, open_documents
from megatron_tspin.errors import ArtifactError
from megatron_tspin.run_folder import file_of

PROMPT = "prompt"
_BINDING_FACTS = ("tokenizer_fingerprint", "template_fingerprint", "examples_sha256")


def binding_facts(prompts: Documents) -> dict[str, Any]:
    """The facts that responses to these prompts must carry in their own sidecar."""
    return {key: prompts.facts[key] for key in _BINDING_FACTS}


class RoleDocuments:
    """Prompts and the responses of some roles; document i is example i in all of them."""

    def __init__(self, prompts: Documents, responses: Mapping[str, Documents]) -> None:
        self._documents = {PROMPT: prompts, **responses}
        self.roles: tuple[str, ...] = tuple(responses)
        """Roles with responses, in the order given."""
        self.num_examples: int = len(prompts)
        self.facts: Mapping[str, Mapping[str, Any]] = {key: item.facts for key, item in self._documents.items()}
        """Sidecar facts by role, and of the prompts under `prompt`."""

    def check_unchanged(self) -> None:
        """See `Documents.check_unchanged`."""
        for documents in self._documents.values():
            documents.check_unchanged()

    def prompt(self, index: int) -> list[int]:
        """Token ids of a prompt."""
        return self._documents[PROMPT][index]

    def response(self, role: str, index: int) -> list[int]:
        """Token ids of a role's response to prompt `index`."""
        return self._documents[role][index]

    def lengths(self, role: str) -> NDArray[np.int64]:
        """Tokens of each document of a role (or of `prompt`), int64 [num_examples]."""
        return self._documents[role].lengths


def open_role_documents(prompt_stem: Path, response_stems: Mapping[str, Path]) -> RoleDocuments:
    """Opens the documents of several roles and checks that they belong together.

    Args:
        prompt_stem: Stem of the prompts, e.g. `run/data/train_prompt`.
        response_stems: Stem of the responses by role.

    Raises:
        ArtifactError: A file is damaged, or the roles differ in their number of documents, their vocabulary,
            tokenizer, template or examples; names both files and both values.
    """
    prompts = open_documents(prompt_stem)
    responses = {role: open_documents(stem) for role, stem in response_stems.items()}
    for documents in responses.values():
        _check_pair(documents, prompts, "documents", len(documents), len(prompts))
        _check_pair(documents, prompts, "vocab_size", documents.vocab_size, prompts.vocab_size)
        for key in _BINDING_FACTS:
            _check_pair(documents, prompts, key, documents.facts.get(key), prompts.facts.get(key))
    return RoleDocuments(prompts, responses)


def _check_pair(documents: Documents, prompts: Documents, name: str, found: object, expected: object) -> None:
    if found != expected:
        raise ArtifactError(
            f"{file_of(documents.path_stem, 'json')}: {name} is {found}, but {expected} in "
            f"{file_of(prompts.path_stem, 'json')}; they are not of the same run: write the older of the two again"
        )
