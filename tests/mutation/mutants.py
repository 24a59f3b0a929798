"""Small faults in Python source: every mutant is the text of a module with one expression or statement changed.

Left alone are annotations, docstrings, imports, f-strings and what a ``raise`` or a logging call says.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

COMPARISONS = {
    ast.Eq: ["!="], ast.NotEq: ["=="], ast.Is: ["is not"], ast.IsNot: ["is"], ast.In: ["not in"], ast.NotIn: ["in"],
    ast.Lt: ["<=", ">="], ast.LtE: ["<", ">"], ast.Gt: [">=", "<="], ast.GtE: [">", "<"],
}  # fmt: skip
BINARY = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*",
    ast.BitOr: "&", ast.BitAnd: "|",
}  # fmt: skip
SIMPLE = (ast.Expr, ast.AugAssign, ast.Assign, ast.AnnAssign, ast.Raise, ast.Delete, ast.Continue, ast.Break)


class Mutant(NamedTuple):
    function: str  # qualified name; "" outside of any
    line: str  # of source on which the change begins, stripped
    change: str  # in words
    nth: int  # of those that are alike in all of the above
    start: int  # bytes of the source that are replaced
    end: int
    text: str
    of: str  # digest of the function, or the statement outside of any, that it is in

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What stays the same when other parts of the module are edited."""
        return self[:4]


def apply(source: str, mutant: Mutant) -> str:
    data = source.encode()
    return (data[: mutant.start] + mutant.text.encode() + data[mutant.end :]).decode()


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a module that parse, in the order of the source."""
    walker = _Walker(source)
    tree = ast.parse(source)
    walker.visit(tree)
    methods = [m for c in tree.body if isinstance(c, ast.ClassDef) for m in c.body]
    units = [walker.whole(statement) for statement in [*tree.body, *methods]]  # the narrowest last
    seen: Counter[tuple[str, str, str]] = Counter()
    numbered = []
    for function, line, change, start, end, text in sorted(walker.found, key=lambda found: found[3:]):
        first, last = [(first, last) for first, last in units if first <= start < last][-1]
        of = hashlib.sha256(walker.data[first:last]).hexdigest()[:12]
        mutant = Mutant(function, line, change, seen[function, line, change], start, end, text, of)
        try:
            ast.parse(apply(source, mutant))
        except SyntaxError:
            continue
        seen[function, line, change] += 1
        numbered.append(mutant)
    return numbered


class _Walker(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.lines = source.encode().splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.data = source.encode()
        self.scope: list[str] = []
        self.bound: list[set[str]] = [set()]
        self.found: list[tuple[str, str, str, int, int, str]] = []

    def span(self, node: ast.AST) -> tuple[int, int]:
        first, last = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        return self.starts[first[0] - 1] + first[1], self.starts[last[0] - 1] + last[1]

    def whole(self, statement: ast.stmt) -> tuple[int, int]:
        """With its decorators."""
        start, end = self.span(statement)
        return min([start, *(self.span(d)[0] - 1 for d in getattr(statement, "decorator_list", []))]), end

    def source(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.data[start:end].decode()

    def add(self, change: str, start: int, end: int, text: str) -> None:
        line = self.data[:start].count(b"\n")
        self.found.append((".".join(self.scope), self.lines[line].decode().strip(), change, start, end, text))

    def replace(self, node: ast.expr, text: str, parentheses: bool = True) -> None:
        before = " ".join(self.source(node).split())
        after = " ".join(text.split())
        self.add(f"{before} -> {after}", *self.span(node), f"({text})" if parentheses else text)

    def between(self, node: ast.expr, left: ast.expr, right: ast.expr, operator: str) -> None:
        """Exchange the operator that stands between two operands."""
        start, end = self.span(node)
        after, before = self.span(left)[1], self.span(right)[0]
        # A parenthesis that closes the left operand, or opens the right one, belongs to it.
        gap = self.data[after:before].decode()
        closing, opening = gap[: len(gap) - len(gap.lstrip(" \n)"))], gap[len(gap.rstrip(" \n(")) :]
        text = self.data[start:after].decode() + f"{closing} {operator} {opening}" + self.data[before:end].decode()
        self.replace(node, text)

    # -- where it goes ----------------------------------------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scope.append(node.name)
        for decorator in node.decorator_list:
            start = self.data.rindex(b"@", 0, self.span(decorator)[0])
            self.add(f"drop @{self.source(decorator)}", start, self.span(decorator)[1], "")
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.bound.append({argument.arg for argument in arguments})
        for child in [*node.args.defaults, *filter(None, node.args.kw_defaults), *_without_docstring(node.body)]:
            self.visit(child)
        self.bound.pop()
        self.scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        for child in _without_docstring(node.body):
            self.visit(child)
        self.scope.pop()

    def visit_Module(self, node: ast.Module) -> None:
        for child in _without_docstring(node.body):
            self.visit(child)

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, SIMPLE):
            self.drop(node)
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
            return
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and self.source(node.func).startswith("logger.")):
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.visit(node.value)
        else:
            super().visit(node)

    def drop(self, node: ast.stmt) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = {n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)}
            fresh = names - self.bound[-1] and not any(isinstance(t, ast.Attribute | ast.Subscript) for t in targets)
            self.bound[-1] |= names
            if fresh or node.value is None:
                return  # a NameError, most often: nothing learned
        self.add("drop the statement", *self.span(node), "pass")

    # -- what it changes --------------------------------------------------------------------------------------------

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for i, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                self.between(node, operands[i], operands[i + 1], other)
        for operand, operator in zip(operands[1:], node.ops, strict=True):
            if not isinstance(operator, ast.Is | ast.IsNot):
                self.visit(operand)
        self.visit(node.left)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for i, operand in enumerate(node.values[1:]):
            self.between(node, node.values[i], operand, "or" if isinstance(node.op, ast.And) else "and")
        word = " and " if isinstance(node.op, ast.And) else " or "
        for i in range(len(node.values)):
            kept = [f"({self.source(value)})" for j, value in enumerate(node.values) if j != i]
            dropped = " ".join(self.source(node.values[i]).split())
            self.add(f"drop the operand {dropped}", *self.span(node), f"({word.join(kept)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in BINARY:
            self.between(node, node.left, node.right, BINARY[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.replace(node, self.source(node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace(node, str(not value), parentheses=False)
        elif value is None:
            self.replace(node, "1", parentheses=False)
        elif isinstance(value, (int, float)):
            self.replace(node, repr(value + 1), parentheses=False)
            if value == 1:
                self.replace(node, "0", parentheses=False)
        elif isinstance(value, str):
            self.replace(node, repr(value + "_"), parentheses=False)

    def visit_Call(self, node: ast.Call) -> None:
        for left, right in zip(node.args, node.args[1:], strict=False):
            same = self.source(left) == self.source(right)
            if not same and not isinstance(left, ast.Starred) and not isinstance(right, ast.Starred):
                (start, a), (b, end) = self.span(left), self.span(right)
                text = self.source(right) + self.data[a:b].decode() + self.source(left)
                self.add(f"swap {self.source(left)}, {self.source(right)}", start, end, text)
        for i, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                parts = [self.source(a) for a in [*node.args, *(k for j, k in enumerate(node.keywords) if j != i)]]
                self.add(
                    f"drop {self.source(keyword)}", *self.span(node), f"{self.source(node.func)}({', '.join(parts)})"
                )
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.add(f"return {' '.join(self.source(node.value).split())} -> None", *self.span(node), "return None")
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None:
                self.add(f"drop the bound of {self.source(node)}", *self.span(bound), "")
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        if len(node.items) == 1 and node.items[0].optional_vars is None:
            expression = node.items[0].context_expr
            self.add(f"drop with {self.source(expression)}", self.span(node)[0], self.span(expression)[1], "if True")
        self.generic_visit(node)

    def negate(self, test: ast.expr) -> None:
        single = isinstance(test, ast.Compare) and len(test.ops) == 1
        if not single and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):  # negated elsewhere
            self.replace(test, f"not ({self.source(test)})")

    def visit_If(self, node: ast.If) -> None:
        if self.source(node.test) == "TYPE_CHECKING":
            return
        self.negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.negate(test)
        self.generic_visit(node)


def _without_docstring(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for i, statement in enumerate(body):
        constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not (i == 0 and constant):
            yield statement
