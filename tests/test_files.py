"""evals/files/__init__.py: what a command may write to, and that it is written whole or not at all."""

import argparse
import errno
import os
import socket
import stat

import pytest

from evals import files
from evals.files import (
    BadOutput,
    check_folder,
    check_output,
    check_target,
    read_bytes,
    replacing,
    write_measured,
    write_output,
)


@pytest.fixture
def before(tmp_path):
    """A file that is there already."""
    path = tmp_path / "before.json"
    path.write_text("before")
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_or_replaced_and_nothing_is_left_beside_it(tmp_path, before):
    os.umask(old := os.umask(0o027))
    before.chmod(0o604)
    for path in (before, tmp_path / "new.json", tmp_path / ("n" * 255)):
        check_output(path)
        assert path.exists() == (path == before) and before.read_text() in ("before", "é\n")
        write_output(path, "é\n")
        assert path.read_bytes() == "é\n".encode()
    assert names(tmp_path) == sorted(["before.json", "new.json", "n" * 255])
    assert stat.S_IMODE(before.stat().st_mode) == 0o604
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == 0o666 & ~old


def test_a_link_is_followed(tmp_path, before):
    (tmp_path / "link").symlink_to(before)
    (tmp_path / "dangling").symlink_to(tmp_path / "new.json")
    for name in ("link", "dangling"):
        check_output(tmp_path / name)
        write_output(tmp_path / name, name)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert before.read_text() == "link" and (tmp_path / "new.json").read_text() == "dangling"


def make(kind, tmp_path):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    if kind == "device":
        path = "/dev/null"
    if kind == "link to a device":
        path.symlink_to("/dev/null")
    if kind == "loop":
        path.symlink_to(path)
    if kind == "no folder":
        path = tmp_path / "none" / "file"
    if kind == "file as a folder":
        path = tmp_path / "before.json" / "file"
    if kind == "long":
        path = tmp_path / ("n" * 256)
    return path


REFUSED = {
    "folder": "it is a folder",
    "pipe": "no regular|a pipe",
    "socket": "a socket",
    "device": "it is a device",
    "link to a device": "it is a device",
    "loop": "Too many levels of symbolic links",
    "no folder": "there is no folder '.*none'",
    "file as a folder": "Not a directory",
    "long": "File name too long",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_regular_file_is_refused_and_left_alone(tmp_path, before, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = make(kind, tmp_path)
    left, mode = names(tmp_path), os.lstat(path).st_mode if os.path.lexists(path) and kind != "long" else None
    for write in (check_target, check_output, lambda path: write_output(path, "after")):
        with pytest.raises(BadOutput, match=f"cannot be written: .*({REFUSED[kind]})") as error:
            write(path)
        assert repr(str(path)) in str(error.value)
    assert names(tmp_path) == left and before.read_text() == "before"
    assert mode is None or os.lstat(path).st_mode == mode


def test_an_input_is_refused_whatever_it_is_called(tmp_path, before, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(before)
    os.link(before, tmp_path / "hard")
    for output in ("before.json", "link", "hard", "./before.json", f"../{tmp_path.name}/before.json"):
        for read in (before, "link", tmp_path):
            with pytest.raises(BadOutput, match="it is read too, as '.*'; name another"):
                check_output(output, ["nothing there", read])
    check_output("new.json", [before, "nothing there", tmp_path])
    with pytest.raises(BadOutput, match="it is read too, as 'new.json'"):
        check_output(tmp_path / "new.json", ["new.json"])
    assert before.read_text() == "before" and "new.json" not in names(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_failure_leaves_the_file_as_it_was(tmp_path, before, monkeypatch, number):
    def fails(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(BadOutput, match=f"before.json' cannot be written: {os.strerror(number)}"):
        write_output(before, "after")
    with pytest.raises(KeyError), replacing(before):
        raise KeyError
    assert before.read_text() == "before" and names(tmp_path) == ["before.json"]


def test_what_cannot_take_its_place_is_kept_beside_it(tmp_path, before, monkeypatch):
    def busy(*arguments):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(files.os, "replace", busy)
    with pytest.raises(BadOutput, match="busy; what it was to hold is in '.*part'"):
        write_output(before, "after")
    (part,) = tmp_path.glob(".*.part")
    assert before.read_text() == "before" and part.read_text() == "after"


def test_a_folder_in_which_no_file_can_be_made_is_refused_at_the_start(tmp_path, before, monkeypatch):
    def refused(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(files.os, "open", refused)
    for check, path in [(check_output, before), (check_output, tmp_path / "new"), (check_folder, tmp_path)]:
        with pytest.raises(BadOutput, match="cannot be written: Permission denied"):
            check(path)


def test_what_was_measured_is_put_elsewhere(tmp_path, before, monkeypatch):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(elsewhere))
    write_measured(before, "after")
    assert before.read_text() == "after" and not names(elsewhere)
    with pytest.raises(BadOutput, match="there is no folder .*; it is in '.*/elsewhere/.*-out.json' instead"):
        write_measured(tmp_path / "no" / "out.json", "measured")
    (path,) = elsewhere.iterdir()
    assert path.read_text() == "measured"
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: "/none")
    with pytest.raises(BadOutput, match="there is no folder '.*/no'$"):
        write_measured(tmp_path / "no" / "out.json", "measured")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permissions_are_tried_at_the_start(tmp_path, before):
    before.chmod(0o444)
    with pytest.raises(BadOutput, match="Permission denied"):
        check_output(before)
    tmp_path.chmod(0o555)
    for check in (check_output, lambda path: check_folder(path.parent)):
        with pytest.raises(BadOutput, match="Permission denied"):
            check(tmp_path / "new.json")


def test_a_folder_for_outputs_is_made_or_refused(tmp_path, before):
    check_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    with pytest.raises(BadOutput, match="before.json' cannot be written: File exists"):
        check_folder(before)


def test_reading(tmp_path, before):
    assert read_bytes(before) == b"before"
    for path, message in [(tmp_path, "Is a directory"), ("/dev/zero", "it is a device"), (tmp_path / "no", "No such")]:
        with pytest.raises(OSError, match=message):
            read_bytes(path)


def test_arguments_that_a_shell_left_empty():
    assert files.text_argument("a b") == "a b" and str(files.path_argument("a")) == "a"
    for text in ("", "  "):
        for parse in (files.text_argument, files.path_argument):
            with pytest.raises(argparse.ArgumentTypeError, match=f"must not be empty, got '{text}'"):
                parse(text)
