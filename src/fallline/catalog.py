"""The catalogue: every method with its card, found without importing any of them.

A method is one file of its room. Its card is the module-level literal ``CARD = Card(...)``; the catalogue reads that
literal from the source text, so that searching it needs neither torch nor the method. The method itself is imported
when it is asked for. Another package adds methods through the entry-point group ``fallline.methods``:

    [project.entry-points."fallline.methods"]
    "optimizer/my-rule" = "my_package.my_rule"

What a method's module must hold is `Config` (its hyper-parameters) and `build`, whose arguments depend on the kind; see
docs/contracts.md.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError, nearest

GROUP = "fallline.methods"

#: Folder of the package → the kinds of method that live there. A kind is the key of the recipe that picks it.
ROOMS: dict[str, tuple[str, ...]] = {
    "data": ("data", "sampler"),
    "models": ("model",),
    "adapters": ("adapter",),
    "objectives": ("objective",),
    "gradients": ("estimator",),
    "optim": ("optimizer",),
    "schedules": ("schedule",),
    "probes": ("probe", "audit", "inspection"),
}
KINDS = tuple(kind for kinds in ROOMS.values() for kind in kinds)


@dataclass(frozen=True)
class Card:
    """What a method is, costs, claims, and what was checked here. Every value is a literal.

    Attributes:
        id: lower case with hyphens; the file is the id with underscores.
        kind: the recipe key that picks it, one of `KINDS`.
        summary: one line.
        paper: title; `year`, `repository` (authors' code) and `equation` where they exist.
        reads: signals it reads; an ``audit``, fields of `probes.attack.Seen`. gives: signals it makes. needs: what must
            be true of the run, in words.
        acts_on: ``element``, ``row``, ``matrix`` or ``group``: what of a tensor the rule looks at together.
        couples: for objectives, ``none``, ``group`` or ``batch``.
        state_bytes: parameter role → bytes of optimizer state in float32, an expression in ``n`` (elements), ``rows``,
            ``cols`` and the method's options, evaluated by `cost`; ``any`` stands for the roles not named.
        traffic_bytes: parameter role → least bytes moved in one update, likewise.
        workspace_bytes: parameter role → most bytes that an update takes beside state and gives back, likewise; the
            largest over the parameters counts. Empty: less than 5 MB.
        flops: floating-point operations beyond a plain step, in words or as an expression.
        claim: the paper's number with its setting.
        checked: what was measured here and how, or ``effect not shown``; each figure with its command in brackets.
        evidence: files of figures it quotes, relative to the repository.
        departures: where the authors' released code differs from the paper, and what we do.
        tags: words for the search.
    """

    id: str
    kind: str
    summary: str
    paper: str = ""
    year: int | None = None
    repository: str = ""
    equation: str = ""
    reads: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    acts_on: str = ""
    couples: str = ""
    state_bytes: Mapping[str, str] = field(default_factory=dict)
    traffic_bytes: Mapping[str, str] = field(default_factory=dict)
    workspace_bytes: Mapping[str, str] = field(default_factory=dict)
    flops: str = ""
    claim: str = ""
    checked: str = "effect not shown"
    evidence: tuple[str, ...] = ()
    departures: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A method in the catalogue: its card and the module that holds it, not yet imported."""

    card: Card
    module: str
    path: Path

    def load(self) -> ModuleType:
        """Import the method's module, which has `Config` and `build`."""
        return importlib.import_module(self.module)

    def sources(self) -> dict[str, str]:
        """The files that figures of this method depend on, with their `code_hash`; by their path in the repository."""
        if not self.module.startswith("fallline."):
            return {self.module: code_hash(self.path)}
        root = Path(__file__).parent
        return {
            f"src/fallline/{path.relative_to(root).as_posix()}": code_hash(path) for path in code_of(self.path, root)
        }


def read_card(path: Path) -> Card | None:
    """The card literal of a method file, or None when the file has none.

    Raises:
        InputError: there is a ``CARD`` that is not a literal ``Card(...)``, or it has unknown or missing fields.
    """
    source = path.read_text(encoding="utf-8")
    if "CARD" not in source:
        return None
    for node in ast.parse(source, str(path)).body:
        if assigns_card(node):
            value = node.value  # type: ignore[attr-defined]
            try:
                assert isinstance(value, ast.Call)
                assert not value.args
                return Card(**{str(k.arg): ast.literal_eval(k.value) for k in value.keywords})
            except (AssertionError, ValueError, TypeError) as error:
                raise InputError(f"{path}: CARD must be a literal Card(key=value, …): {error}") from None
    return None


def assigns_card(node: ast.stmt) -> bool:
    """Whether a statement is ``CARD = …``."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return isinstance(target, ast.Name) and target.id == "CARD"


def code_hash(path: Path) -> str:
    """The sha256 of what a Python file does, to tell whether a figure is older than the code it was measured with.

    Left out are the card, docstrings, lines of comment only and blank lines, so that quoting a figure or finding better
    words does not make it stale. Lines of text are hashed, not the tree, which differs between versions of Python.

    Raises:
        SyntaxError: it is not Python.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    words: set[int] = set()
    quoted: set[int] = set()
    for node in statements_and_strings(ast.parse(text, str(path))):
        span = range(node.lineno - 1, node.end_lineno or node.lineno)
        if isinstance(node, ast.expr):
            quoted.update(span[1:])
        elif owns_its_lines(node, lines):
            words.update(span)
    kept = (
        line if i in quoted else line.rstrip()
        for i, line in enumerate(lines)
        if i not in words and (i in quoted or line.partition("#")[0].strip())
    )
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


FAST = ("kernels", "polar.py")
"""Where code lies, below the package, that a method may be timed by without it being in the method's own file."""


def code_of(method: Path, root: Path) -> list[Path]:
    """A method's own file, and those of `FAST` that it imports, also by way of parts in its room.

    Args:
        method: its file. root: the package's folder.
    """
    seen, pending, found = {method}, [method], [method]
    while pending:
        for path in sorted(imports(pending.pop(), root)):
            if path in seen:
                continue
            seen.add(path)
            if path.relative_to(root).parts[0] in FAST:
                found.append(path)
            if path.parent == method.parent or path in found:
                pending.append(path)
    return found


def imports(path: Path, root: Path) -> set[Path]:
    """The files of the package in `root` that one of them imports by relative names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            base = base.joinpath(*node.module.split(".")) if node.module else base
            found |= {base.with_suffix(".py"), *((base / alias.name).with_suffix(".py") for alias in node.names)}
    return {file for file in found if root in file.parents and file.is_file()}


def statements_and_strings(tree: ast.Module) -> Iterator[ast.stmt | ast.expr]:
    """Statements that do nothing but tell (docstrings, the card), and the strings in all others."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                yield node
            case ast.Assign() | ast.AnnAssign() if node in tree.body and assigns_card(node):
                yield node
            case ast.Constant(value=str() | bytes()) | ast.JoinedStr():
                yield node
            case _:
                pending += ast.iter_child_nodes(node)


def owns_its_lines(node: ast.stmt, lines: list[str]) -> bool:
    """Whether nothing but a comment stands beside a statement."""
    before = lines[node.lineno - 1].encode()[: node.col_offset]
    after = lines[(node.end_lineno or 1) - 1].encode()[node.end_col_offset :]
    return not before.strip() and not after.partition(b"#")[0].strip()


@cache
def entries() -> dict[tuple[str, str], Entry]:
    """All methods, ours and those of installed packages, by (kind, id), in the order of the rooms and then by id."""
    found: dict[tuple[str, str], Entry] = {}
    here = Path(__file__).parent
    for room in ROOMS:
        for path in sorted((here / room).glob("[a-z]*.py")):
            card = read_card(path)
            if card is not None:
                found[card.kind, card.id] = Entry(card, f"fallline.{room}.{path.stem}", path)
    for point in entry_points(group=GROUP):
        spec = importlib.util.find_spec(point.value)
        card = read_card(Path(spec.origin)) if spec is not None and spec.origin is not None else None
        if card is None:
            raise InputError(f"entry point {point.name!r} of {GROUP} names {point.value!r}, which has no CARD")
        if (card.kind, card.id) in found:
            raise InputError(f"{card.kind} {card.id!r} is in {found[card.kind, card.id].module} and in {point.value}")
        found[card.kind, card.id] = Entry(card, point.value, Path(str(spec.origin)) if spec else Path())
    return found


def find(kind: str, id: str) -> Entry:
    """The method `id` of a kind.

    Raises:
        InputError: no such method; the message names the nearest.
    """
    if (kind, id) in entries():
        return entries()[kind, id]
    raise InputError(f"unknown {kind} {id!r}; {nearest(id, (i for k, i in entries() if k == kind))}")


def search(query: str = "") -> list[Entry]:
    """Methods whose card contains every word of the query, those that have it in id, kind or tags first."""
    words = query.lower().split()

    def rank(entry: Entry) -> int | None:
        card = entry.card
        front = " ".join((card.id, card.kind, *card.tags)).lower()
        whole = " ".join(map(str, asdict(card).values())).lower()
        if not all(word in whole for word in words):
            return None
        return sum(word not in front for word in words)

    ranked = [(r, entry) for entry in entries().values() if (r := rank(entry)) is not None]
    return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}


def by_role(formulas: Mapping[str, str], role: str) -> str:
    """A card's formula for a parameter role: its own, else that of ``any``."""
    return formulas[role] if role in formulas else formulas["any"]


def bytes_of(formulas: Mapping[str, str], role: str, shape: Sequence[int], options: Mapping[str, Any]) -> float:
    """A card's formula for one parameter; 0 where the card has none.

    Args:
        formulas: such as `Card.state_bytes`.
        role, shape: the parameter's.
        options: the method's; those that are numbers or text count.
    """
    if not formulas:
        return 0
    n = math.prod(shape)
    rows = shape[0] if len(shape) > 1 else 1
    known = {k: v for k, v in options.items() if isinstance(v, (int, float, str))}
    return cost(by_role(formulas, role), n=n, rows=rows, cols=n // max(1, rows), **known)


def cost(expression: str, **values: float | str) -> float:
    """Evaluate a card's cost formula. A comparison counts 1 when it holds, 0 when not.

    >>> cost("4 * n * (momentum > 0) + 4 * min(rows, cols)", n=6, rows=2, cols=3, momentum=0.9)
    32
    >>> cost("4 * n * (split == 'rows')", n=6, split="columns")
    0
    """

    def walk(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return walk(body)
            case ast.Constant(value=int() | float() | str() as value):
                return value
            case ast.Name(id=name) if name in values:
                return values[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](walk(left), walk(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](walk(operand))
            case ast.Compare(left=left, ops=[ast.Gt()], comparators=[right]):
                return int(walk(left) > walk(right))
            case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
                return int(walk(left) == walk(right))
            case ast.Call(func=ast.Name(id="min" | "max" as name), args=args):
                return {"min": min, "max": max}[name](*map(walk, args))
        raise InputError(f"cost formula {expression!r} is not arithmetic over {', '.join(values)}")

    return walk(_parsed(expression))


@cache
def _parsed(expression: str) -> ast.Expression:
    return ast.parse(expression, mode="eval")
