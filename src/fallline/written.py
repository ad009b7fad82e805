"""What users write: YAML whose values know the file and line they stand at, and ``key=value`` texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.reader import ReaderError

from .errors import InputError


@dataclass(frozen=True)
class Node:
    """A value of the recipe and where it was written: scalar, list of nodes, or mapping of nodes."""

    value: Any
    where: str = ""


class _Loader(yaml.SafeLoader):
    """YAML with the scalars a recipe needs: null, true/false, whole numbers, numbers (also 1e-3), text."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text `_Loader`, or another reader of YAML, would take for something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # PyYAML takes 0100 for 64


def dump(value: Mapping[str, Any]) -> str:
    """YAML that `read` makes the same of."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read(text: str, origin: str) -> Node:
    """YAML text as nodes that know their line."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except ReaderError as error:
        raise InputError(f"{origin!r} holds a character that YAML does not take: {chr(error.character)!r}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise InputError(f"{origin}{line} is not YAML: {getattr(error, 'problem', None) or error}") from None

    def walk(node: yaml.Node) -> Node:
        where = f" ({origin}:{node.start_mark.line + 1})"
        if isinstance(node, yaml.MappingNode):
            found: dict[str, Node] = {}
            for key_node, value_node in node.value:
                key, at = key_node.value, f" ({origin}:{key_node.start_mark.line + 1})"
                if not isinstance(key, str):
                    raise InputError(f"a key must be a name{at}")
                if key in found:
                    raise InputError(f"duplicate key {key!r}: first{found[key].where}, again{at}")
                found[key] = Node(walk(value_node).value, at)
            return Node(found, where)
        if isinstance(node, yaml.SequenceNode):
            return Node([walk(child) for child in node.value], where)
        try:
            return Node(loader.construct_object(node), where)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # of a tag that does not suit
            raise InputError(f"cannot read {node.value!r}: {getattr(error, 'problem', None) or error}{where}") from None

    try:
        return Node(None) if root is None else walk(root)
    except RecursionError:
        raise InputError(f"{origin}: an alias contains itself") from None


def plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {k: plain(v) for k, v in node.value.items()}
    return [plain(v) for v in node.value] if isinstance(node.value, list) else node.value


def settings_of(texts: Sequence[str]) -> dict[str, Any]:
    """What ``key=value`` texts say, the values read as a recipe's are.

    Raises:
        InputError: one is no such text, a key is given twice, or a value is not YAML.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"an option is key=value, got {text!r}")
        if key in found:
            raise InputError(f"{key!r} is given twice (in {text!r})")
        found[key] = plain(read(value, text))
    return found


def relocate(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {k: Node(relocate(v.value, where), where) for k, v in value.items()}
    return [Node(relocate(v.value, where), where) for v in value] if isinstance(value, list) else value


def commas(text: str) -> Iterator[str]:
    """Text split at the commas that are in no bracket."""
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A mapping of mappings with joined keys: ``optimizer.lr``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
