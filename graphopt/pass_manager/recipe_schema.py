"""The JSON schema of recipe files, which editors check and complete them by."""

from __future__ import annotations

from typing import Any

from graphopt.pass_manager.contract import declared_passes
from graphopt.pass_manager.description import describe_passes
from graphopt.pass_manager.options import options_model
from graphopt.pass_manager.recipe import VERSION


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe file, with every pass's options.

    `$defs` holds the schema of each pass's options, by the name of the pass.
    """
    options: dict[str, Any] = {}
    for name, declared in sorted(declared_passes().items()):
        schema = options_model(declared).model_json_schema()
        (told,) = describe_passes(name)
        options[name] = {**schema, "title": name, "description": told["summary"]}
    with_options = {
        "type": "object",
        "properties": {
            name: {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]} for name in options
        },
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "graphopt recipe",
        "type": "object",
        "properties": {
            "version": {"const": VERSION},
            "passes": {
                "type": ["array", "null"],
                "items": {"anyOf": [{"enum": list(options)}, with_options]},
            },
        },
        "required": ["passes"],
        "additionalProperties": False,
        "$defs": options,
    }
