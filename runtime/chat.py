"""Putting a conversation into a model's chat template. Imports nothing of graphopt.

A template is a program of the model's author. It runs in a sandbox, which keeps it from files and
from the interpreter, and in a process of its own, whose memory and time are bounded.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

CHAT_LIMITS = {"seconds": 10, "bytes": 2**30, "characters": 2**20}
"""What a chat template may take, and how long what it writes may be."""


def render_chat() -> None:
    """Render a template, in a process of its own: both come through stdin and stdout, as JSON."""
    given, limits = json.load(sys.stdin)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # which Windows lacks

        resource.setrlimit(resource.RLIMIT_AS, (limits["bytes"],) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (limits["seconds"],) * 2)
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """Marks what an assistant said, for training; here it is plain text."""

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        Generation.tags = {"generation"}

        def refuse(message: str) -> None:
            raise TemplateError(message)

        def plain_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = plain_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        parts, length = [], 0
        for part in environment.from_string(given.pop("template")).generate(**given):
            length += len(part)
            if length > limits["characters"]:
                raise ValueError(f"it writes more than {limits['characters']} characters")
            parts.append(part)
        answer = {"text": "".join(parts)}
    except MemoryError:
        answer = {"error": f"it takes more than {limits['bytes'] >> 20} MiB of memory"}
    except ImportError:
        answer = {"error": "it needs the package jinja2, which is not installed"}
    except RecursionError:
        answer = {"error": "it calls itself without end"}
    except Exception as error:  # of the template, of any kind
        answer = {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:200]}
    json.dump(answer, sys.stdout)


def chat_text(template: str, messages: Sequence[Mapping[str, str]], special: dict[str, str]) -> str:
    """Return a conversation as a chat template puts it, with the beginning of an answer.

    Templates of models that see may read a content as a list of parts, and of a text write nothing:
    one that leaves out what is said gets it as such lists.

    Args:
        template: In Jinja, as transformers has it.
        messages: The turns so far, each with its `role` and its `content`.
        special: Texts of the special tokens, such as `bos_token`, which a template may write.

    Raises:
        ValueError: The template fails, or takes more than `CHAT_LIMITS` allow; saying which.
    """
    said = [message["content"].strip() for message in messages]
    text = rendered_chat(template, messages, special)
    if all(content in text for content in said):
        return text
    parts = [[{"type": "text", "text": message["content"]}] for message in messages]
    pairs = zip(messages, parts, strict=True)
    listed = [{**message, "content": part} for message, part in pairs]
    try:
        other = rendered_chat(template, listed, special)
    except ValueError:
        return text
    return other if all(content in other for content in said) else text


def rendered_chat(
    template: str, messages: Sequence[Mapping[str, Any]], special: dict[str, str]
) -> str:
    """Return what a template writes of messages as they are; see `chat_text`."""
    given = {
        "template": template,
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **special,
    }
    imports = (
        "import contextlib, json, sys\nfrom datetime import datetime\nfrom typing import Any\n"
    )
    code = f"{imports}{inspect.getsource(render_chat)}\nrender_chat()"
    seconds = CHAT_LIMITS["seconds"]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            input=json.dumps([given, CHAT_LIMITS]),
            capture_output=True,
            text=True,
            timeout=2 * seconds,
            check=False,
            start_new_session=True,  # Ctrl-C in a terminal is this process's own affair
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        answer = {"error": f"it takes longer than {seconds} s"}
    except ValueError:
        # Ended from outside: by the limit on its time, most likely.
        answer = {"error": f"it takes longer than {seconds} s or more memory than there is"}
    if "error" in answer:
        raise ValueError(answer["error"])
    text: str = answer["text"]
    return text
