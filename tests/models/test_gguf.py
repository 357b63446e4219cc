"""Reading and writing of GGUF headers."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sollold.models.footprint.footprint import footprint
from sollold.models.footprint.read_shape import shape_of
from sollold.models.footprint.run_options import Run
from sollold.models.gguf import reader as gguf
from sollold.models.gguf import writer
from sollold.models.gguf.header import Array, GgufError
from sollold.models.gguf.long_arrays import long_arrays
from sollold.models.gguf.writer import NewTensor
from tests.gguf.architectures import ARCHITECTURES
from tests.gguf.size import Size
from tests.gguf.writer import write

_KEEP_FIXTURE = settings(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_VALUES = st.one_of(
    _TEXT,
    st.booleans(),
    st.integers(-(2**31), 2**64 - 1),
    st.floats(allow_nan=False, width=32),
    st.lists(_TEXT, min_size=1, max_size=90),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50),
    st.lists(st.booleans(), min_size=1, max_size=50),
    st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=50),
)


@_KEEP_FIXTURE
@given(
    metadata=st.dictionaries(_TEXT.filter(bool).filter(lambda key: key != "general.alignment"), _VALUES),
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=5),
)
def test_a_written_header_is_read_back(
    tmp_path: Path, metadata: dict[str, writer.MetadataValue], shapes: list[list[int]]
) -> None:
    path = tmp_path / "a.gguf"
    tensors = [NewTensor(f"t{number}", tuple(shape), 0) for number, shape in enumerate(shapes)]
    writer.write(path, metadata, tensors)
    header = gguf.read(path)
    assert header.size == path.stat().st_size
    assert [(tensor.name, tensor.shape, tensor.size) for tensor in header.tensors] == [
        (tensor.name, tensor.shape, tensor.size) for tensor in tensors
    ]
    for key, value in metadata.items():
        read = header.metadata[key]
        if isinstance(value, list):
            assert isinstance(read, Array)
            assert read.length == len(value)
            if read.values is None:
                assert isinstance(value[0], str)
                assert len(value) > 64
            else:
                assert list(read.values) == value
        else:
            assert read == value
            assert type(read) is type(value)


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write(
        tmp_path_factory.mktemp("whole") / "a.gguf", "llama", Size(layers=1, embd=64, heads=2, ff=64)
    )
    return path.read_bytes()


def _refused(path: Path) -> GgufError:
    """The `GgufError` of reading a file, with its attributes checked."""
    with pytest.raises(GgufError) as caught:
        gguf.read(path)
    error = caught.value
    assert str(path) in str(error)
    assert error.reason
    assert error.offset >= 0
    return error


@_KEEP_FIXTURE
@given(data=st.data())
def test_corrupt_bytes_give_a_header_or_a_gguf_error(
    tmp_path: Path, valid_file: bytes, data: st.DataObject
) -> None:
    changed = bytearray(valid_file)
    for _ in range(data.draw(st.integers(1, 4))):
        offset = data.draw(st.integers(0, min(len(valid_file), 14_000) - 1))
        size = data.draw(st.sampled_from((1, 4, 8)))
        changed[offset : offset + size] = (
            data.draw(st.sampled_from((b"\0", b"\x01", b"\x7f", b"\xff"))) * size
        )
    path = tmp_path / "a.gguf"
    path.write_bytes(changed[: len(valid_file)])
    try:
        header = gguf.read(path)
    except GgufError as error:
        assert error.path == str(path)
    else:
        assert sum(tensor.size for tensor in header.tensors) <= 2 * len(valid_file) * len(header.tensors)
        # The footprint of any header can be computed.
        guess = footprint(shape_of(header), Run(context=4096, slots=2))
        assert len(guess.weights) == guess.layers + 1
        guess.compute(0, guess.layers + 1, devices=2, offloaded=guess.layers + 1)


@_KEEP_FIXTURE
@given(part=st.floats(0, 0.999))
def test_every_truncation_is_detected(tmp_path: Path, valid_file: bytes, part: float) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(valid_file[: int(len(valid_file) * part)])
    error = _refused(path)
    assert error.offset <= len(valid_file)


@_KEEP_FIXTURE
@given(tail=st.binary(max_size=400))
def test_random_bytes_after_the_magic_give_a_header_or_a_gguf_error(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + tail)
    try:
        gguf.read(path)
    except GgufError as error:
        assert error.path == str(path)


def _counts(tensors: int, keys: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 1, 1) + bytes(60), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 1, 1) + bytes(60), "version 1"),
        (_counts(2**63, 0) + bytes(60), "tensors declared"),
        (_counts(0, 2**63) + bytes(60), "keys declared"),
        (_counts(0, 1) + struct.pack("<Q", 2**63) + bytes(60), "a metadata key of"),
        (_counts(0, 1) + struct.pack("<Q1sII", 1, b"k", 8, 0) + b"\xff" * 8, "bytes"),
        (_counts(0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**60), "strings"),
        (_counts(0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1) + bytes(60), "unknown type 9"),
        (_counts(0, 1) + struct.pack("<Q1sI", 1, b"k", 77) + bytes(60), "unknown type 77"),
        (_counts(1, 0) + struct.pack("<Q1sI", 1, b"t", 9) + bytes(90), "9 dimensions"),
        (_counts(1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, 36, 0) + bytes(90), "type 36"),
        (_counts(1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 31, 8, 0) + bytes(90), "rows of 31"),
        (_counts(1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, 8, 7) + bytes(90), "not aligned"),
        (_counts(1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 2**62, 0, 0) + bytes(90), "truncated"),
        (_counts(1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 2**62) + bytes(90), "truncated"),
    ],
)
def test_malformed_files_are_refused_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert message in str(_refused(path))


def test_missing_files_directories_and_pipes_are_refused(tmp_path: Path) -> None:
    assert "the file is missing" in str(_refused(tmp_path / "none.gguf"))
    assert "not a file" in str(_refused(tmp_path)) or "directory" in str(_refused(tmp_path))
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    _refused(pipe)


def test_a_hostile_file_is_refused_quickly_and_with_little_memory(tmp_path: Path) -> None:
    # A sparse file of 1 GiB that declares one array of as many empty strings as fit.
    path = tmp_path / "hostile.gguf"
    with path.open("wb") as file:
        file.write(_counts(0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**27 - 8))
        file.truncate(2**30)
    tracemalloc.start()
    start = time.monotonic()
    assert "more than is plausible" in str(_refused(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - start < 5
    assert peak < 16 * 2**20


def test_long_arrays_are_skipped_and_can_be_read_later(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    tokens = [f"token{number}" for number in range(40_000)]
    metadata: dict[str, writer.MetadataValue] = {
        "general.architecture": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 40_000,
        "tokenizer.chat_template": "{{ x }}" * 20_000,
    }
    writer.write(path, metadata, [NewTensor("t", (4,), 0)])
    header = gguf.read(path)
    assert header.metadata["tokenizer.ggml.tokens"] == Array(40_000, None)
    assert header.length("tokenizer.ggml.token_type") == 40_000
    assert long_arrays(header) == {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 40_000,
    }
    assert header.text("tokenizer.chat_template") == "{{ x }}" * 20_000
    assert header.tensors[0].size == 16


def _shard(path: Path, number: int, count: int, tensors: int, total: int) -> None:
    metadata: dict[str, writer.MetadataValue] = {
        "split.no": number,
        "split.count": count,
        "split.tensors.count": total,
    }
    if number == 0:
        metadata["general.architecture"] = "llama"
    names = [f"blk.{number}.t{index}" for index in range(tensors)]
    writer.write(path, metadata, [NewTensor(name, (8,), 0) for name in names])


def test_all_shards_are_read_from_any_of_them(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{number + 1:05}-of-00003.gguf" for number in range(3)]
    for number, path in enumerate(paths):
        _shard(path, number, 3, 2, 6)
    for path in paths:
        header = gguf.read(path)
        assert header.files == tuple(map(str, paths))
        assert header.architecture == "llama"
        assert [tensor.file for tensor in header.tensors] == [0, 0, 1, 1, 2, 2]
        assert header.size == sum(path.stat().st_size for path in paths)
    assert gguf.read_files([paths[2], paths[0], paths[1]]).files == tuple(map(str, paths))
    _shard(paths[2], 2, 3, 1, 6)
    assert "5 tensors" in str(_read_error(paths[0]))
    paths[1].unlink()
    assert "the file is missing" in str(_read_error(paths[0]))
    with pytest.raises(GgufError, match="shard 2 of 3 is missing"):
        gguf.read_files([paths[0], paths[2]])
    with pytest.raises(GgufError, match="the same shard"):
        gguf.read_files([paths[0], paths[0]])


def _read_error(path: Path) -> GgufError:
    with pytest.raises(GgufError) as caught:
        gguf.read(path)
    return caught.value


def test_invalid_shard_names_are_refused(tmp_path: Path) -> None:
    assert gguf.shards("m.gguf") == ("m.gguf",)
    for name in ("m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-00001-of-99999.gguf"):
        with pytest.raises(GgufError):
            gguf.shards(tmp_path / name)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_headers_of_every_architecture_are_read(tmp_path: Path, architecture: str) -> None:
    path = write(tmp_path / "a.gguf", architecture, Size(layers=8))
    header = gguf.read(path)
    assert header.architecture == ARCHITECTURES[architecture].name
    assert header.integer(f"{header.architecture}.block_count") == 8
    assert max(tensor.offset + tensor.size for tensor in header.tensors) <= header.size


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(ValueError, match="bytes of data"):
        writer.write(path, {}, [NewTensor("t", (8,), 0, lambda: [b"short"])])
    assert list(tmp_path.iterdir()) == []
