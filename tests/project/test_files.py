"""Atomic writing: all or nothing, and early refusal."""

import os
import stat
import tempfile

import pytest
from conftest import failing

from nm_act.files import check_new_folder, check_writable, new_folder, write_atomic


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_bytes_and_text(tmp_path):
    write_atomic(tmp_path / "a.bin", b"\x00\xff")
    write_atomic(str(tmp_path / "a.txt"), "naïve\r\nline\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "a.txt").read_bytes() == "naïve\r\nline\n".encode()
    assert _names(tmp_path) == ["a.bin", "a.txt"]


def test_replaces_and_keeps_mode(tmp_path):
    path = tmp_path / "a"
    path.write_text("old content that is longer")
    path.chmod(0o640)
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_new_file_has_the_mode_that_open_gives(tmp_path):
    write_atomic(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_atomic(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("a.json")
    write_atomic("a.json", "{}")
    assert _names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_leaves_everything_as_it_was(tmp_path, monkeypatch, step, error):
    path = tmp_path / "a"
    path.write_text("old")

    monkeypatch.setattr(os, step, failing(error))
    with pytest.raises(type(error)) as caught:
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["a"]
    if isinstance(error, OSError):
        told = f"cannot write {str(path)!r}: no space left on device; choose a path that can be written"
        assert str(caught.value) == told


@pytest.mark.parametrize("function", [check_writable, lambda path: write_atomic(path, "x")])
class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "error", "sentence"),
        [
            (".", ValueError, "is a folder; name a file inside it"),
            (None, ValueError, "got an empty one; name a file"),
            ("missing/a", FileNotFoundError, r"'.*missing' does not exist; create it or choose another"),
            ("file/a", OSError, "does not exist; create it or choose another path"),
        ],
    )
    def test_paths(self, tmp_path, function, name, error, sentence):
        (tmp_path / "file").write_text("x")
        with pytest.raises(error, match=sentence):
            function("" if name is None else tmp_path / name)

    def test_device(self, function):
        with pytest.raises(ValueError, match="is not one; choose another path"):
            function(os.devnull)
        assert stat.S_ISCHR(os.stat(os.devnull).st_mode)

    def test_no_permission(self, tmp_path, function, monkeypatch):
        denied = failing(PermissionError(13, "Permission denied"))  # a real one does not stop root
        monkeypatch.setattr(tempfile, "mkstemp", denied)
        with pytest.raises(PermissionError, match="permission denied; choose a path that can be written"):
            function(tmp_path / "a")


def test_only_bytes_and_text(tmp_path):
    with pytest.raises(TypeError, match=r"expected bytes or str .* got dict; encode it first"):
        write_atomic(tmp_path / "a", {})
    assert _names(tmp_path) == []


def test_check_touches_nothing(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    before = path.stat()
    check_writable(path)
    check_writable(tmp_path / "b")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert _names(tmp_path) == ["a"]


# ---- folders


def test_a_folder_appears_whole_with_the_modes_that_open_and_mkdir_give(tmp_path):
    with new_folder(tmp_path / "a" / "b") as place:
        assert _names(tmp_path / "a") == [place.name]
        (place / "private").write_text("x")
        (place / "private").chmod(0o600)
        (place / "inner").mkdir()
        (place / "inner" / "file").write_text("y")
    assert _names(tmp_path / "a") == ["b"]
    assert _names(tmp_path / "a" / "b") == ["inner", "private"]
    assert (tmp_path / "a" / "b" / "inner" / "file").read_text() == "y"
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "a" / "b" / "private").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "a").stat().st_mode


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("odd")])
def test_a_folder_that_fails_leaves_nothing(tmp_path, error, there):
    path = tmp_path / "a"
    if there:
        path.mkdir()

    def fill():
        with new_folder(path) as place:
            (place / "half").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fill()
    assert _names(tmp_path) == (["a"] if there else [])
    assert not there or _names(path) == []


@pytest.mark.parametrize("make", [check_new_folder, lambda path: new_folder(path).__enter__()])
def test_a_folder_that_is_taken(tmp_path, make):
    (tmp_path / "file").write_text("x")
    for name, sentence in (
        (".", "expected a new or empty folder, but"),
        ("file", r"expected a folder to write, but .*file' is a file; choose another path"),
        ("file/in", r"expected a folder to write, but .*file' is a file; choose another path"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make(tmp_path / name)
    assert _names(tmp_path) == ["file"]


def test_a_folder_filled_meanwhile_is_kept(tmp_path):
    def fill():
        with new_folder(tmp_path / "a") as place:
            (place / "new").write_text("x")
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "other").write_text("theirs")

    with pytest.raises(OSError, match="cannot write"):
        fill()
    assert _names(tmp_path) == ["a"]
    assert _names(tmp_path / "a") == ["other"]


def test_a_folder_that_cannot_be_made_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", failing(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot make the folder .*: no space left on device; choose another path"):
        check_new_folder(tmp_path / "a" / "b")
    assert _names(tmp_path) == []
