"""Options of `quantize` as the command that goes over the wire. Values are the server's to judge, not ours."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from quarrel.codes import has_groups
from quarrel.elements import WORDS
from quarrel.errors import InvalidInputError, cut

STANDARD = ["@standard"]
"""What a checkpoint's `ignore` is by default: embeddings, output heads, norms and routers."""

_RIGHT = 'Write a recipe as `{"rules": [{"targets": ["*"], "scheme": "int8"}], "ignore": ["@standard"]}`.'

# These say how a scheme is laid over layers: beside a scheme, or in the one rule that stands for it.
_OF_A_RULE = ("group_size", "channel_dims", "on_indivisible", "fallback", "amax")


def quantize(
    *,
    is_path: bool,
    scheme: str | None,
    recipe: Mapping[str, Any] | str | os.PathLike[str] | None,
    profile: str | None,
    ignore: Sequence[str] | None,
    targets: Sequence[str] = ("*",),
    **options: Any,
) -> dict[str, Any]:
    """The command, as a dict. `targets` are what a scheme goes to that stands beside `ignore`.

    Raises:
        InvalidInputError: `ignore` stands beside `recipe` or `profile`, which have their own.
    """
    body = {name: written(name, value) for name, value in options.items() if value is not None}
    if profile is not None:
        body["profile"] = written("profile", profile)
    if recipe is not None:
        body["recipe"] = written("recipe", _recipe(recipe))
    if ignore is None and is_path and recipe is None and profile is None:
        ignore = STANDARD
    if ignore is not None and (isinstance(ignore, (str, bytes)) or not isinstance(ignore, Collection)):
        raise TypeError(cut(f"`ignore` is `{ignore!r}`, a `{type(ignore).__name__}`: expected a list of targets"))
    if scheme is not None and ignore:
        rule = _rule(written("scheme", scheme), targets, body)
        body["recipe"] = {"rules": [rule], "ignore": written("ignore", list(ignore))}
    elif scheme is not None:
        body["scheme"] = written("scheme", scheme)
    elif ignore and not is_path or ignore and ignore is not STANDARD:
        raise InvalidInputError(
            "`ignore` stands beside `scheme`", reason="option_conflict", advice="Put it into the recipe."
        )
    return {"quantize": body}


def stored(scheme: str | None, options: Mapping[str, Any], dequantize: str | None = None) -> dict[str, Any]:
    """The command for a checkpoint. A bare scheme is left to the server, which knows whether it is a model's, or of a GGUF file."""
    if dequantize is not None:
        if scheme is not None or options:
            raise InvalidInputError(
                "options of `quantize` stand beside `dequantize`", advice="Leave out the one or the others."
            )
        return {"dequantize": {"dtype": dequantize}}
    options = {"recipe": None, "profile": None, "ignore": None, **options}
    return quantize(is_path=False, scheme=scheme, targets=["Linear"], **options)


def uri(place: str | os.PathLike[str]) -> str:
    """A URI as it is; a path as that of this machine's disk, which a server on it shares."""
    if isinstance(place, str) and "://" in place:
        return place
    return pathlib.Path(os.path.abspath(place)).as_uri()


def location(address: str) -> str:
    """An address as pyarrow has it.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(address, str):
        raise TypeError(f"`address` is a `{type(address).__name__}`: expected a text such as `grpc://HOST:PORT`")
    if address.startswith("unix:"):
        return "grpc+unix://" + os.path.abspath(address.removeprefix("unix:"))
    return address if "://" in address else f"grpc://{address}"


def written(name: str, value: Any) -> Any:
    """The value, if JSON can hold it.

    Raises:
        TypeError, InvalidInputError: it cannot, for its type or its numbers. Both name the option.
    """
    try:
        json.dumps(value, allow_nan=False, default=number)
    except TypeError as error:
        raise TypeError(cut(f"`{name}` is `{value!r}`, which JSON cannot hold: {error}")) from None
    except (ValueError, RecursionError) as error:
        shown = "nested too deep" if isinstance(error, RecursionError) else f"`{value!r}`"
        raise InvalidInputError(
            f"`{name}` is {shown}, which JSON cannot hold: {error}", advice="Give finite numbers, in a few levels."
        ) from None
    return value


def number(value: Any) -> float:
    """What `json` does not know, if it is one of numpy's floats: `amax` is, as `abs(array).max()` gives it.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, np.generic) and value.dtype.name in WORDS:
        return float(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _recipe(recipe: Any) -> dict[str, Any]:
    if isinstance(recipe, (str, os.PathLike)):
        return read_recipe(recipe)
    if isinstance(recipe, Mapping):
        return dict(recipe)
    raise TypeError(f"`recipe` is a `{type(recipe).__name__}`: expected a dict of `rules` and `ignore`, or a path")


def _rule(scheme: str, targets: Sequence[str], body: dict[str, Any]) -> dict[str, Any]:
    """The rule that gives the targets the scheme, with the options that `body` then no longer holds."""
    rule: dict[str, Any] = {"targets": list(targets), "scheme": scheme}
    rule.update({name: body.pop(name) for name in _OF_A_RULE if name in body})
    fallback = rule.get("fallback")
    rungs = fallback.get("schemes") if isinstance(fallback, Mapping) else None
    schemes = [scheme, *(rungs if isinstance(rungs, (list, tuple)) else ())]
    if "group_size" in rule or has_groups(each for each in schemes if isinstance(each, str)):
        rule.setdefault("on_indivisible", "keep")
    return rule


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe from a file: `.json`, or `.yaml` and `.yml` if PyYAML is installed.

    Raises:
        OSError: it cannot be read.
        InvalidInputError: it is not what its name says, or PyYAML is missing.
    """
    path = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"recipe `{path}` is not UTF-8: {error}", advice=_RIGHT) from None
    except ValueError as error:  # a zero in the path
        raise InvalidInputError(f"cannot open recipe `{path}`: {error}", advice="Correct the path.") from None
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
        except (yaml.YAMLError, RecursionError) as error:
            raise InvalidInputError(f"recipe `{path}` is not YAML: {error}", advice=_RIGHT) from None
    elif path.endswith(".json"):
        try:
            recipe = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"recipe `{path}` is not JSON: {error}", advice=_RIGHT) from None
    else:
        raise InvalidInputError(
            f"recipe `{path}`: expected a name that ends in .json, .yaml or .yml", advice="Rename the file."
        )
    if not isinstance(recipe, dict):
        raise InvalidInputError(
            f"recipe `{path}` holds a {type(recipe).__name__}: expected `rules` and `ignore`", advice=_RIGHT
        )
    return recipe
