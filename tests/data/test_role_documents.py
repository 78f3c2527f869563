from pathlib import Path
from typing import Any

import pytest

from megatron_tspin.data.indexed import open_documents, write_documents
from megatron_tspin.data.role_documents import binding_facts, open_role_documents
from megatron_tspin.errors import ArtifactError

FACTS = {"tokenizer_fingerprint": "t", "template_fingerprint": "p", "examples_sha256": "e"}
PROMPTS, ANNOTATED, SYNTHETIC = [[1], [2, 3]], [[4], [5, 6, 7]], [[8, 9], [5]]


def write(folder: Path, key: str, documents: list[list[int]], vocab_size: int = 100, **facts: Any) -> Path:
    write_documents(folder / f"train_{key}", documents, vocab_size, FACTS | facts)
    return folder / f"train_{key}"


def test_roles_are_read_beside_their_prompts(tmp_path: Path) -> None:
    prompts = write(tmp_path, "prompt", PROMPTS)
    roles = {"annotated": write(tmp_path, "annotated", ANNOTATED), "synthetic": write(tmp_path, "synthetic", SYNTHETIC)}
    documents = open_role_documents(prompts, roles)
    assert (documents.num_examples, documents.roles) == (2, ("annotated", "synthetic"))
    assert [documents.prompt(i) for i in range(2)] == PROMPTS
    assert [documents.response("annotated", i) for i in range(2)] == ANNOTATED
    assert [documents.response("synthetic", i) for i in range(2)] == SYNTHETIC
    assert documents.lengths("annotated").tolist() == [1, 3]
    assert documents.lengths("prompt").tolist() == [1, 2]
    assert binding_facts(open_documents(prompts)) == FACTS


@pytest.mark.parametrize(
    ("documents", "vocab_size", "facts", "expected"),
    [
        ([[4]], 100, {}, "documents is 1, but 2 in"),
        (ANNOTATED, 200, {}, "vocab_size is 200, but 100 in"),
        (ANNOTATED, 100, {"tokenizer_fingerprint": "u"}, "tokenizer_fingerprint is u, but t in"),
        (ANNOTATED, 100, {"template_fingerprint": "q"}, "template_fingerprint is q, but p in"),
        (ANNOTATED, 100, {"examples_sha256": None}, "examples_sha256 is None, but e in"),
    ],
)
def test_roles_of_another_run_are_refused_with_both_values(
    tmp_path: Path, documents: list[list[int]], vocab_size: int, facts: dict[str, Any], expected: str
) -> None:
    prompts = write(tmp_path, "prompt", PROMPTS)
    role = write(tmp_path, "synthetic", documents, vocab_size, **facts)
    with pytest.raises(ArtifactError, match=expected) as caught:
        open_role_documents(prompts, {"synthetic": role})
    assert str(tmp_path / "train_synthetic_document.json") in str(caught.value)
    assert str(tmp_path / "train_prompt_document.json") in str(caught.value)
