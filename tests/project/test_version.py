"""The commit that measurements are labelled with."""

import subprocess

import pytest

from nm_act import version


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A package folder inside an empty folder, for `commit` to look at."""
    (tmp_path / "nm_act").mkdir()
    monkeypatch.setattr(version, "__file__", str(tmp_path / "nm_act" / "version.py"))
    version.commit.cache_clear()
    yield tmp_path
    version.commit.cache_clear()


def git(folder, *arguments) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", "-C", folder, *names, *arguments], check=True, capture_output=True, text=True).stdout


def test_commit_of_a_checkout(checkout):
    git(checkout, "init", "-q")
    (checkout / "a").write_text("1")
    git(checkout, "add", "a")
    git(checkout, "commit", "-q", "-m", "one")
    short = git(checkout, "rev-parse", "--short", "HEAD").strip()
    assert version.commit() == short
    (checkout / "a").write_text("2")
    assert version.commit() == short  # that of the code which was loaded
    version.commit.cache_clear()
    assert version.commit() == f"{short}-dirty"


def test_the_version_where_there_is_no_checkout(checkout, monkeypatch):
    assert version.commit() == version.__version__
    version.commit.cache_clear()
    (checkout / ".git").mkdir()  # of nothing
    assert version.commit() == version.__version__
    version.commit.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert version.commit() == version.__version__
