"""Change a module in one small place after another and see whether its tests notice: the share that they do is the score.

    python tools/mutate.py [dinoreg/grid.py test/test_grid.py] [--line N]

Each mutant is run in a fork of this process, which has loaded the libraries already. docs/testing.md says which survive and why.
Exit status 1 if more survive than ``--survivors`` allows.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SECONDS, MEMORY = 60, 2**33  # for the tests of one mutant: some never end, and some ask for everything
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Add, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is}


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a node may become, with words for it."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        other = copy.deepcopy(node)
        other.op = SWAPS[type(node.op)]()  # type: ignore[assignment]
        yield "operator", other
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        other = copy.deepcopy(node)
        other.ops[0] = SWAPS[type(node.ops[0])]()  # type: ignore[call-overload]
        yield "comparison", other
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield "sign", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield "branches", ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.If):
        yield "condition", ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


def mutants(source: str) -> Iterator[tuple[int, str, ast.Module]]:
    """(line, before and after, changed tree) of every mutant."""
    tree = ast.parse(source)
    for parent in list(ast.walk(tree)):
        for field, value in ast.iter_fields(parent):
            nodes = value if isinstance(value, list) else [value]
            for index, node in enumerate(nodes):
                for what, other in changes(node) if isinstance(node, ast.AST) else ():
                    nodes[index] = other
                    setattr(parent, field, nodes if isinstance(value, list) else other)
                    words = f"{what}: {ast.unparse(node).splitlines()[0]} -> {ast.unparse(other).splitlines()[0]}"
                    yield getattr(node, "lineno", 0), words, ast.fix_missing_locations(copy.deepcopy(tree))
                    nodes[index] = node
                    setattr(parent, field, value)


def survives(tree: ast.Module, path: Path, tests: list[str]) -> bool:
    """Whether the tests pass with this tree in place of the module: with the torch form (of a GPU) and with compiled kernels,
    the ones that take their time last."""
    runs = ((True, ["-k", "not threads"]), (False, ["-k", "not threads"]), (True, []), (False, []))
    return all(_passes(tree, path, [*chosen, *tests], plain) for plain, chosen in runs)


def _passes(tree: ast.Module, path: Path, tests: list[str], plain: bool) -> bool:
    """Whether the tests pass; what does not come to an end counts as noticed."""
    import pytest

    from dinoreg import compiled

    process = os.fork()
    if process == 0:
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            if plain:
                compiled.usable = lambda *tensors: False
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = types.ModuleType(name)
            module.__file__ = str(path)
            sys.modules[name] = module
            exec(compile(tree, str(path), "exec"), module.__dict__)
            os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
        except BaseException:
            os._exit(1)
    return os.waitpid(process, 0)[1] == 0


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Mutation testing of one module.")
    parser.add_argument("module", nargs="?", type=Path, default=ROOT / "dinoreg" / "grid.py")
    parser.add_argument("tests", nargs="*", default=[str(ROOT / "test" / "test_grid.py")])
    parser.add_argument("--line", type=int, help="mutants of this line alone")
    parser.add_argument("--sample", type=int, help="only so many of them, drawn at random (seed 0)")
    parser.add_argument("--survivors", type=int, default=0, help="how many may survive (%(default)s)")
    options = parser.parse_args()
    import hypothesis  # noqa: F401  here, and once: a fork has them
    import scipy.ndimage  # noqa: F401
    import torch

    from dinoreg import grid

    ones = torch.ones(1, 4, 4, 4)  # the kernels are loaded once, too
    grid.warp(grid.apply_axes(ones, [torch.eye(4)] * 3), torch.zeros(3, 4, 4, 4))
    grid.warp_slope(ones, torch.zeros(3, 4, 4, 4), ones)
    del sys.modules["dinoreg.grid"]

    torch.set_num_threads(1)
    path, started = options.module.resolve(), time.monotonic()
    source = path.read_text(encoding="utf-8")
    if not survives(ast.parse(source), path, options.tests):
        print("the tests fail without any change")
        return 2
    found = [mutant for mutant in mutants(source) if options.line in (None, mutant[0])]
    everything, alive = len(found), 0
    if options.sample:
        found = Random(0).sample(found, min(options.sample, everything))
    for number, (line, words, tree) in enumerate(found, 1):
        if survives(tree, path, options.tests):
            alive += 1
            print(f"{path.name}:{line}: {words}", flush=True)
        if number % 10 == 0:
            print(f"{number} tried, {alive} survive", file=sys.stderr, flush=True)
    print(f"{len(found)} of {everything} mutants of {path.name} in {time.monotonic() - started:.0f} s: {len(found) - alive} seen "
          f"({100 * (len(found) - alive) / max(1, len(found)):.1f} %), {alive} survive")
    return 1 if alive > options.survivors else 0


if __name__ == "__main__":
    sys.exit(main())
