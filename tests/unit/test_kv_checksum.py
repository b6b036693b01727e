"""The C++ checksums equal xxhash's bit for bit, copy what they read, and touch nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash

from workers.kv_memory import checksum as loading
from workers.kv_memory.checksum import (
    CHECKSUM,
    MIN_NATIVE_BYTES,
    Library,
    View,
    checksums,
    copy_and_checksum,
    library,
    native_copy,
)
from workers.machine.native_build import BuildFailed, InstructionSet, compile_library, supported

GUARD = 0xA5


@pytest.fixture(scope="module")
def noise() -> View:
    return np.random.default_rng(3).integers(0, 256, (3 << 20) + 4096, np.uint8)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels need a C++ compiler")


@pytest.fixture
def native() -> Library:
    """Skips for want of a compiler only: a kernel that a compiler refuses is a failure."""
    if shutil.which("g++") is None:
        pytest.skip("the kernels need a C++ compiler")
    found = library()
    assert found is not None, "there is a compiler, and the kernels were not built"
    return found


def expected(view: View) -> int:
    return int(xxhash.xxh3_64_intdigest(view.tobytes()))


def check_copy(native: Library, source: View, target_offset: int, is_streaming: bool) -> None:
    room = np.full(source.nbytes + 256, GUARD, np.uint8)
    first = -room.ctypes.data % 64 + 64 + target_offset
    target = room[first : first + source.nbytes]
    assert native_copy(native, [target], [source], is_streaming) == [expected(source)]
    assert np.array_equal(target, source)
    assert (room[:first] == GUARD).all() and (room[first + source.nbytes :] == GUARD).all()


def test_every_length_up_to_2048_has_the_checksum_of_xxhash(noise: View) -> None:
    views = [noise[7 : 7 + n] for n in range(2049)]
    wanted = [expected(view) for view in views]
    assert checksums(views) == wanted
    assert [checksums([view])[0] for view in views] == wanted
    targets = [np.zeros_like(view) for view in views]
    assert [copy_and_checksum([t], [s])[0] for t, s in zip(targets, views, strict=True)] == wanted
    assert all(np.array_equal(t, s) for t, s in zip(targets, views, strict=True))


@pytest.mark.parametrize("is_streaming", [False, True])
def test_every_native_length_is_copied_exactly(native: Library, noise: View, is_streaming: bool) -> None:
    for n in range(MIN_NATIVE_BYTES, 2049):
        check_copy(native, noise[n % 64 : n % 64 + n], 0, is_streaming)


@pytest.mark.parametrize("is_streaming", [False, True])
def test_every_alignment_is_copied_exactly(native: Library, noise: View, is_streaming: bool) -> None:
    random = np.random.default_rng(5)
    for _ in range(200):
        size, at, offset = int(random.integers(241, 9000)), int(random.integers(0, 64)), int(random.integers(0, 64))
        check_copy(native, noise[at : at + size], offset, is_streaming)


@pytest.mark.parametrize("size", [65536, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 13])
@pytest.mark.parametrize("is_streaming", [False, True])
def test_large_pieces_are_copied_exactly(native: Library, noise: View, size: int, is_streaming: bool) -> None:
    check_copy(native, noise[3 : 3 + size], 0, is_streaming)
    assert checksums([noise[:size], noise[5:]]) == [expected(noise[:size]), expected(noise[5:])]


def test_many_pieces_in_one_call_keep_their_order(noise: View) -> None:
    sources = [noise[i * 4096 : i * 4096 + 300 + i] for i in range(300)]
    targets = [np.zeros_like(source) for source in sources]
    assert copy_and_checksum(targets, sources) == [expected(source) for source in sources]
    assert checksums([]) == copy_and_checksum([], []) == []


def test_sizes_that_differ_are_refused(noise: View) -> None:
    with pytest.raises(ValueError):
        copy_and_checksum([np.zeros(300, np.uint8)], [noise[:301]])


def test_views_with_gaps_are_refused(noise: View) -> None:
    with pytest.raises(ValueError):
        checksums([noise[:600:2]])
    with pytest.raises(ValueError):
        copy_and_checksum([np.zeros((300, 2), np.uint8)[:, 0]], [noise[:600:2]])


def test_without_a_compiler_xxhash_does_the_same(noise: View, monkeypatch: pytest.MonkeyPatch) -> None:
    views = [noise[:5000], noise[100:400]]
    targets = [np.zeros_like(view) for view in views]
    wanted = checksums(views)
    monkeypatch.setattr(loading, "_library", None)
    monkeypatch.setattr(loading, "_is_tried", True)
    assert library() is None
    assert checksums(views) == wanted == copy_and_checksum(targets, views)
    assert np.array_equal(targets[1], views[1])


def test_a_machine_without_a_compiler_says_so(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="no C"):
        compile_library(CHECKSUM, CHECKSUM.sets[0], tmp_path, compilers=("no-such-compiler",))


@needs_compiler
@pytest.mark.parametrize("each", supported(CHECKSUM.sets), ids=lambda each: each.name)
def test_every_set_of_this_processor_computes_the_same(noise: View, tmp_path: Path, each: InstructionSet) -> None:
    other = Library(compile_library(CHECKSUM, each, tmp_path))
    for size in (241, 1024, 1025, 70001):
        for is_streaming in (False, True):
            check_copy(other, noise[9 : 9 + size], 0, is_streaming)
