"""Metadata of a checkpoint builds its dataclasses and does nothing else, whatever is in the file."""

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tspin.checkpoint.safe_pickle import load
from megatron_tspin.errors import ArtifactError


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory, ranks: Any, tiny_checkpoint: Any) -> bytes:
    """What megatron-core writes."""
    from tests.training.rescored import save_policy

    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    ranks(1).run(save_policy, tiny_checkpoint("tied"), folder)
    return (folder / ".metadata").read_bytes()


def refused(content: bytes) -> str:
    with pytest.raises(ArtifactError) as caught:
        load(io.BytesIO(content))
    return str(caught.value)


def test_real_metadata_is_read_as_by_pickle(metadata: bytes) -> None:
    assert load(io.BytesIO(metadata)) == pickle.loads(metadata)


PATH = b"cpathlib\nPosixPath\n"
METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
ATTRIBUTES = b"N}(X\x06\x00\x00\x00parentX\x01\x00\x00\x00xu\x86"
"""(None, {"parent": "x"}): what BUILD sets one by one."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02" + PATH + ATTRIBUTES + b"b.", "sets attributes of a type; not loaded"),
        (b"\x80\x02" + METADATA + ATTRIBUTES + b"b.", "sets attributes of a type; not loaded"),
        (
            b"\x80\x02ctorch.serialization\n_get_layout\n" + ATTRIBUTES + b"b.",
            "sets attributes of a function; not loaded",
        ),
        (b"\x80\x02" + PATH + b"X\x01\x00\x00\x00a\x85R" + ATTRIBUTES + b"b.", "sets attributes of a PosixPath"),
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "names os.system, which does not belong there"),
        (b"\x80\x02\x82\x01.", "is not what megatron-core writes"),  # EXT1
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "is not what megatron-core writes"),  # BINPERSID
        (b"\x80\x02(icollections\nOrderedDict\n.", "is not what megatron-core writes"),  # INST
        (b"", "is not what megatron-core writes"),
        (b"\x80\x02X\xff\xff\xff\x7fa", "is not what megatron-core writes"),
    ],
)
def test_anything_else_is_refused(content: bytes, message: str) -> None:
    before = pathlib.PurePath.parent
    assert message in refused(content)
    assert pathlib.PosixPath.parent is before and "parent" not in vars(pathlib.PosixPath)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_bytes_are_metadata_or_an_error(data: st.DataObject, metadata: bytes, tmp_path: Path) -> None:
    """Whatever is changed in a real file, nothing but our own error comes out, and nothing is made or changed."""
    content = bytearray(metadata)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    classes = {name: dict(vars(kind)) for name, kind in vars(pathlib).items() if isinstance(kind, type)}
    try:
        load(io.BytesIO(bytes(content)))
    except ArtifactError:
        pass
    assert {name: dict(vars(kind)) for name, kind in vars(pathlib).items() if isinstance(kind, type)} == classes
    assert list(tmp_path.iterdir()) == []
