"""Every error of a command is one sentence; a bug is called one; --debug shows the traceback."""

from __future__ import annotations

import errno
import json
import re

import pytest
import torch
import typer
from command_line import runner

from graphopt.cli.commands import app
from graphopt.cli.shared import errors_as_sentences
from graphopt.errors import CaptureError, PassError, UsageError, first_line
from graphopt.support.boundary import BUG_CODE, out_of_memory, users_model


def run(error, *args):
    """Run a command that raises `error`; return (exit code, stderr in one line)."""
    own = typer.Typer()

    @own.command()
    @errors_as_sentences
    def command(number: int = 0) -> None:
        if isinstance(error, BaseException):
            raise error
        error()

    result = runner().invoke(own, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, " ".join(result.stderr.split())


def allocate():
    torch.empty(2**62, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("It is wrong.", "Mend it."), 2, "error: It is wrong. Mend it."),
        (MemoryError(), 1, "error: The memory of this machine does not suffice. .+"),
        (allocate, 1, "error: The memory of this machine does not suffice. .+"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: The memory of the GPU does .+"),
        (RuntimeError("std::bad_alloc"), 1, "error: The memory of this machine .+"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "error: The memory of this .+"),
        (OSError(errno.ENOSPC, "No space", "x"), 1, "error: The disk is full at x. Free some .+"),
        (OSError(errno.EACCES, "Denied", "x"), 1, "error: A file operation failed at x: Denied."),
        (KeyboardInterrupt(), 130, "error: Interrupted; .+"),
        (KeyError("x"), BUG_CODE, "error: This is a bug in graphopt: KeyError.+--debug .+"),
        (RecursionError("deep"), BUG_CODE, "error: This is a bug in graphopt: .+"),
        (ValueError("a\nb"), BUG_CODE, "error: This is a bug in graphopt: ValueError: a. Run .+"),
    ],
)
def test_errors_are_sentences(error, code, said):
    found, text = run(error)
    assert found == code and re.fullmatch(said, text), text
    assert "Traceback" not in text


def test_the_traceback_is_shown_on_request():
    for error in (KeyError("x"), UsageError("It is wrong.")):
        _, text = run(error, "--debug")
        assert text.startswith("Traceback (most recent call last)") and "error: " in text


def test_every_command_has_the_option():
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        result = runner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
        assert "--debug" in result.stdout


def test_memory_is_found_behind_other_errors():
    try:
        try:
            raise MemoryError
        except MemoryError as inner:
            raise ValueError("it failed") from inner
    except ValueError as error:
        assert out_of_memory(error) == "this machine"
    assert out_of_memory(ValueError("bad_alloc")) is None
    try:
        try:
            raise MemoryError
        except MemoryError as inner:
            raise PassError("The windows do not fit the memory.", "Give fewer.") from inner
    except PassError as error:
        assert run(error)[1] == "error: The windows do not fit the memory. Give fewer."


def test_errors_of_libraries_name_the_model():
    said = pytest.raises(CaptureError, match=r"my/model cannot be built: Expecting value: line 1")
    with said, users_model("my/model", "be built"):
        json.loads("x")


def test_bugs_and_memory_are_not_blamed_on_the_model():
    from graphopt.pass_manager.contract import make_pass

    with pytest.raises(TypeError), users_model("model", "be built"):
        make_pass("dead-code-elimination", 3)
    with pytest.raises(RuntimeError, match=r"allocate|overflow"), users_model("model", "be built"):
        allocate()


def test_reasons_are_one_short_line():
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(KeyError("x")) == "KeyError 'x'"
    assert first_line(ValueError("a.\nb")) == "a"
    assert len(first_line(ValueError("x" * 10_000))) < 310


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "model", "--prompt", "a\udcffb"],
        ["inspect", "model\udc80"],
        ["compile", "model", "--out", "out\udcff"],
        ["eval", "model", "--text", "\udcff.txt"],
        ["compile", "model", "--passes", "\udcff"],
    ],
)
def test_arguments_whose_bytes_are_no_text(args):
    result = runner().invoke(app, args)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and re.match(r"error: The argument .* is not UTF-8 text", said)


def test_a_link_that_leads_nowhere_is_told_what_an_editable_install_needs(tmp_path):
    link = tmp_path / "renamed.py"
    link.symlink_to(tmp_path / "no-more.py")
    found, text = run(FileNotFoundError(errno.ENOENT, "No such file", str(link)))
    assert found == 1 and "renamed.py: No such file. It is a link that leads nowhere." in text
    assert "install it again" in text
    found, text = run(FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "x")))
    assert found == 1 and "install" not in text
