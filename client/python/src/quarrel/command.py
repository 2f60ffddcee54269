"""Options of `quantize` as the command that goes over the wire. Values are the server's to judge, not ours."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from quarrel.codes import has_groups
from quarrel.errors import InvalidInputError

STANDARD = ["@standard"]
"""What a checkpoint's `ignore` is by default: embeddings, output heads, norms and routers."""

# These say how a scheme is laid over layers: beside a scheme, or in the one rule that stands for it.
_OF_A_RULE = ("group_size", "channel_dims", "on_indivisible", "fallback")


def quantize(
    *,
    is_path: bool,
    scheme: str | None,
    recipe: Mapping[str, Any] | str | os.PathLike[str] | None,
    profile: str | None,
    ignore: Sequence[str] | None,
    **options: Any,
) -> dict[str, Any]:
    """The command, as a dict.

    Raises:
        InvalidInputError: `ignore` stands beside `recipe` or `profile`, which have their own.
    """
    body = {name: value for name, value in options.items() if value is not None}
    if profile is not None:
        body["profile"] = profile
    if recipe is not None:
        body["recipe"] = read_recipe(recipe) if isinstance(recipe, (str, os.PathLike)) else dict(recipe)
    if ignore is None and is_path and recipe is None and profile is None:
        ignore = STANDARD
    if scheme is not None and ignore:
        if isinstance(ignore, str):
            raise TypeError(f"`ignore` is the string `{ignore}`: expected a list of targets")
        body["recipe"] = {"rules": [_rule(scheme, body)], "ignore": list(ignore)}
    elif scheme is not None:
        body["scheme"] = scheme
    elif ignore and not is_path or ignore and ignore is not STANDARD:
        raise InvalidInputError(
            "`ignore` stands beside `scheme`", reason="option_conflict", advice="Put it into the recipe."
        )
    return {"quantize": body}


def _rule(scheme: str, body: dict[str, Any]) -> dict[str, Any]:
    """The rule that gives every layer the scheme, with the options that `body` then no longer holds."""
    rule: dict[str, Any] = {"targets": ["*"], "scheme": scheme}
    rule.update({name: body.pop(name) for name in _OF_A_RULE if name in body})
    fallback = rule.get("fallback")
    rungs = fallback.get("schemes", []) if isinstance(fallback, Mapping) else []
    if "group_size" in rule or has_groups([scheme, *map(str, rungs)]):
        rule.setdefault("on_indivisible", "keep")
    return rule


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe from a file: `.json`, or `.yaml` and `.yml` if PyYAML is installed.

    Raises:
        OSError: it cannot be read.
        InvalidInputError: it is not what its name says, or PyYAML is missing.
    """
    path = os.fspath(path)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if path.endswith((".yaml", ".yml")):
        try:
            import yaml
        except ImportError:
            raise InvalidInputError(
                f"recipe `{path}` is YAML, and PyYAML is not installed",
                advice="Install PyYAML, or `quarrel-flight[yaml]`; or write the recipe as JSON.",
            ) from None
        try:
            recipe = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidInputError(f"recipe `{path}` is not YAML: {error}") from None
    elif path.endswith(".json"):
        try:
            recipe = json.loads(text)
        except ValueError as error:
            raise InvalidInputError(f"recipe `{path}` is not JSON: {error}") from None
    else:
        raise InvalidInputError(f"recipe `{path}`: expected a name that ends in .json, .yaml or .yml")
    if not isinstance(recipe, dict):
        raise InvalidInputError(f"recipe `{path}` holds a {type(recipe).__name__}: expected `rules` and `ignore`")
    return recipe
