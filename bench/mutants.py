"""Wrong programs from right ones: one operator, constant or condition of a function changed at a time."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator

OTHER_OPERATOR = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def mutants(source: str, function: str) -> list[str]:
    """Every program that differs from ``source`` by one change in the body of ``function``, in a fixed random order."""
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}
    found = []
    for place in range(sum(1 for _ in _body(tree, function))):
        for change in range(3):
            mutant = copy.deepcopy(tree)
            node = next(n for i, n in enumerate(_body(mutant, function)) if i == place)
            if _change(node, change) and (text := ast.unparse(ast.fix_missing_locations(mutant))) not in seen:
                seen.add(text)
                found.append(text)
    random.Random(0).shuffle(found)
    return found


def _body(tree: ast.Module, function: str) -> Iterator[ast.AST]:
    """The nodes of a function's statements, its docstring left out."""
    (definition,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    for statement in definition.body[1:]:
        yield from ast.walk(statement)


def _change(node: ast.AST, change: int) -> bool:
    """Change a node in place; False where there is nothing to change in this way."""
    match node:
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if change == 0 and type(node.op) in OTHER_OPERATOR:
            node.op = OTHER_OPERATOR[type(node.op)]()
        case ast.Compare() if change == 0 and type(node.ops[0]) in OTHER_OPERATOR:
            node.ops[0] = OTHER_OPERATOR[type(node.ops[0])]()
        case ast.Constant(value=bool()) if change == 0:
            node.value = not node.value
        case ast.Constant(value=int() | float()) if change < 2 and not isinstance(node.value, bool):
            node.value += 1 if change else -1
        case ast.Constant(value=str()) if change == 0:
            node.value += "x"
        case ast.If() | ast.While() | ast.IfExp() if change == 1:
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case ast.Return() if change == 2 and node.value is not None:
            node.value = ast.Constant(None)
        case _:
            return False
    return True
