"""The chat of `graphopt generate`, typed into and interrupted; prompts from files and pipes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import runner
from tiny_models import byte_tokenizer, save_tiny

from graphopt.cli import keyboard
from graphopt.cli.chat import chat
from graphopt.cli.commands import app
from graphopt.errors import UsageError


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Let Ctrl-C interrupt, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


ROLES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("chat") / "tiny", max_position_embeddings=4096)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ROLES
    tokenizer.save_pretrained(folder)
    return folder


class Echo:
    """In the place of a conversation: says what it is asked, letter by letter."""

    has_turns = True

    def __init__(self) -> None:
        self.heard: list[str] = []

    def reset(self) -> None:
        self.heard.append("(reset)")

    def answer(self, prompt: str, stopped: Callable[[], bool]) -> Iterator[str]:
        if prompt == "too long":
            raise UsageError("It is too long.", "Shorten it.")
        self.heard.append(prompt)
        return self._letters(prompt, stopped)

    def _letters(self, prompt: str, stopped: Callable[[], bool]) -> Iterator[str]:
        for letter in prompt:
            if stopped():
                return
            if letter == "!":
                signal.raise_signal(signal.SIGINT)
            yield letter


def typed(lines: list[Any], monkeypatch: pytest.MonkeyPatch, conversation: Any = None) -> Any:
    """Chat with lines that are typed, exceptions among them; return the conversation."""
    script = iter([*lines, EOFError])

    def ask(prompt: str) -> str:
        line = next(script)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(keyboard, "ask", ask)
    conversation = conversation or Echo()
    chat(conversation)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return conversation


def test_lines_are_answered_until_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = typed(["one", "", "  ", " two ", KeyboardInterrupt, "three"], monkeypatch)
    assert echo.heard == ["one", "two", "three"]
    assert capsys.readouterr().out == "one\ntwo\n\nthree\n\n"


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    echo = typed(["/help", "/reset", "/etc/hosts", "/ is a slash", "/exit", "more"], monkeypatch)
    assert echo.heard == ["(reset)", "/etc/hosts", "/ is a slash"]
    said = capsys.readouterr().err
    assert said.count("/exit or Ctrl-D leaves") == 2 and "is forgotten" in said


def test_what_is_wrong_with_a_prompt_ends_no_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = typed(["too long", "one"], monkeypatch)
    assert echo.heard == ["one"]
    assert "error: It is too long.\nShorten it.\n" in capsys.readouterr().err


def test_control_c_ends_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The second press in one answer does not wait for the step to end.
    echo = typed(["ab!cd", "ef", "a!!b", "gh"], monkeypatch)
    assert echo.heard == ["ab!cd", "ef", "a!!b", "gh"]
    printed = capsys.readouterr()
    assert printed.out == "ab!\nef\na!\ngh\n\n" and printed.err.count("ended by Ctrl-C") == 2


def test_a_model_without_a_template_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = Echo()
    echo.has_turns = False
    typed(["one"], monkeypatch, echo)
    assert "No chat template: each line is continued by itself" in capsys.readouterr().err


def test_a_line_is_asked_for_on_stderr_where_stdout_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    keyboard.hide_stdin()
    assert keyboard.ask("> ") == "hello\n"
    with pytest.raises(EOFError):
        keyboard.ask("> ")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "> > ")


def answers(*args: Any, stdin: str | None = None, code: int = 0) -> Any:
    """Run `generate`; return what it prints as JSON, or what it says where it is refused."""
    command = ["generate", *map(str, args), "--max-new-tokens", "4", "--json"]
    done = runner().invoke(app, command, input=stdin)
    assert done.exit_code == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


@pytest.mark.slow
def test_a_prompt_is_piped_in(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a command leaves it behind that ran in this process: what is piped in now is what counts.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    keyboard.hide_stdin()
    piped = answers(source, stdin="say\nthe\n")
    assert piped["prompt"] == "say\nthe"
    assert piped["text"] == answers(source, "--prompt", "say\nthe")["text"]
    refused = answers(source, stdin="", code=2)
    assert "There is no prompt: stdin is empty" in refused and "--prompts FILE" in refused


@pytest.mark.slow
def test_prompts_of_a_file_are_answered_each_by_itself(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"say\\nthe"\n"fox"\n')
    options = ("--temperature", "1", "--seed", "3", "--system", "be calm")
    found = answers(source, "--prompts", path, *options)
    alone = [answers(source, "--prompt", prompt, *options) for prompt in ("say\nthe", "fox")]
    assert [answer["text"] for answer in found["answers"]] == [one["text"] for one in alone]
    assert [answer["prompt"] for answer in found["answers"]] == ["say\nthe", "fox"]
    assert found["sampling"] == alone[0]["sampling"]
    assert "Give one of them" in answers(source, "--prompts", path, "--prompt", "x", code=2)
    # As text, each answer has a line of its own, and its prompt stands on stderr.
    command = ["generate", str(source), "--prompts", str(path), "--max-new-tokens", "4", *options]
    done = runner().invoke(app, command)
    texts = [one["text"] for one in alone]
    assert done.stdout == f"{texts[0]}\n\n{texts[1]}\n" and "> fox" in done.stderr


def test_sampling_options_come_before_the_model_s_own(source: Path) -> None:
    options = ("--min-p", "0.2", "--repetition-penalty", "1.3")
    used = answers(source, "--prompt", "hi", *options)["sampling"]
    assert (used["temperature"], used["min_p"], used["repetition_penalty"]) == (1.0, 0.2, 1.3)
    for wrong in (("--min-p", "2"), ("--repetition-penalty", "0"), ("--repetition-penalty", "nan")):
        assert "Generation needs" in answers(source, "--prompt", "hi", *wrong, code=2)
    assert "Greedy decoding draws nothing" in answers(
        source, "--prompt", "hi", "--greedy", "--min-p", "0.1", code=2
    )


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        import pty

        self.process, self.handle = pty.fork()
        if self.process == 0:
            os.execv(sys.executable, [sys.executable, *command])
        self.printed = ""

    def until(self, text: str) -> str:
        """Return what is printed up to a text, which is awaited."""
        self._await(lambda: text in self.printed, repr(text))
        before, _, self.printed = self.printed.partition(text)
        return before

    def more(self, count: int) -> None:
        """Wait for so many letters."""
        self._await(lambda: len(self.printed) >= count, f"{count} letters")

    def press_until(self, key: str, text: str) -> None:
        """Press a key until a text is printed: one that comes with the prompt may be lost.

        Python's readline waits for a key, and not for a signal that came just before.
        """
        for _ in range(60):
            self.type(key)
            with contextlib.suppress(AssertionError):
                self._await(lambda: text in self.printed, repr(text), seconds=2)
                break
        self.until(text)

    def _await(self, there: Callable[[], bool], what: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not there():
            ready, _, _ = select.select([self.handle], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {what} in {self.printed!r}"
            self.printed += os.read(self.handle, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def end(self) -> int:
        """Return the exit code, once it has printed all."""
        with contextlib.suppress(OSError):
            while os.read(self.handle, 4096):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_a_chat_in_a_terminal(source: Path) -> None:
    terminal = Terminal(
        "-m", "graphopt.cli.commands", "generate", str(source), "--max-new-tokens", "4000"
    )
    try:
        assert "/reset forgets" in terminal.until("> ")
        terminal.type("hello\n")
        terminal.until("hello")  # which the terminal shows as it is typed
        terminal.more(8)  # of an answer, which may hold anything
        terminal.type("\x03")
        terminal.until("(ended by Ctrl-C)")
        terminal.until("> ")
        terminal.press_until("\x03", "Ctrl-D leaves")  # where nothing is answered
        terminal.until("> ")
        terminal.type("/reset\n")
        terminal.until("is forgotten")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(terminal.process, signal.SIGKILL)
