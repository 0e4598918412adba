"""The And-Or graph of an AOGNet block, as data: which nodes, which edges, in which order. No torch here.

Li, Song, Wu, "AOGNets: Compositional Grammatical Architectures for Deep Learning", CVPR 2019,
https://arxiv.org/abs/1711.05847, section 3. Independent implementation.

``print(build_grammar(grid=2, pruning=1))``::

     id  node     children  lateral  paths
      1  T[0,1]                          1
      5  T[0]                            1
      3  O[0]     5                      1
      6  T[1]                            1
      4  O[1]     6         3            1
      2  A[0,1]1  3 4                    1
      0  O[0,1]   1 2                    1
"""

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

TERMINAL, AND, OR = 'T', 'A', 'O'


class Symbol(NamedTuple):
    """What a node stands for: an interval of cells, and one way to make it."""

    kind: str
    first: int
    last: int
    split: int = 0
    """Cells in the left part of an AND; 0 for the others."""

    @property
    def width(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        """``O[1,3]``; ``T[2]`` for one cell; ``A[0,3]1`` for an AND whose left part is one cell wide."""
        cells = f'{self.first}' if self.width == 1 else f'{self.first},{self.last}'
        return f'{self.kind}[{cells}]{self.split or ""}'


@dataclass(frozen=True)
class Node:
    """A node of the graph with its edges, by node id.

    Args:
        id: number in order of creation; the root is 0. Part of the checkpoints' keys.
        symbol: kind, interval and split.
        children: by the grammar, by ascending id: what an AND concatenates and an OR sums. None for a terminal.
        lateral: what is added on top: a neighbour of the same kind and width, at most one.
        residual_lateral: those of ``lateral`` that share no parent with this node; they join the residual too.
        paths: number of ways from the root down to here by the grammar's edges.
        residual_scale: factor of each child in the residual: this node's paths over the child's, so that a child
            which several parents use does not count several times.
    """

    id: int
    symbol: Symbol
    children: tuple[int, ...]
    lateral: tuple[int, ...]
    residual_lateral: tuple[int, ...]
    paths: int
    residual_scale: tuple[float, ...]


@dataclass(frozen=True)
class Grammar:
    """And-Or graph over ``grid`` cells.

    Args:
        grid: number of cells N.
        nodes: by id.
        order: ids in an order of evaluation, every node after what it takes: depth first, the root last.
    """

    grid: int
    nodes: tuple[Node, ...]
    order: tuple[int, ...]

    def __str__(self) -> str:
        """A table with a line per node, in order of evaluation."""
        rows = [('id', 'node', 'children', 'lateral', 'paths')]
        for node in (self.nodes[i] for i in self.order):
            edges = [' '.join(map(str, ids)) for ids in (node.children, node.lateral)]
            rows.append((str(node.id), str(node.symbol), *edges, str(node.paths)))
        width = [max(map(len, column)) for column in zip(*rows)]
        return '\n'.join(
            f'{i:>{width[0] + 1}}  {node:{width[1]}}  {children:{width[2]}}  {lateral:{width[3]}}  {paths:>{width[4]}}'
            for i, node, children, lateral, paths in rows
        )


def build_grammar(grid: int, pruning: int, lateral: bool = True) -> Grammar:
    """The graph of all ways to parse ``grid`` cells into intervals.

    - The root is the OR over all cells.
    - An OR makes its interval as a terminal, or as one of the ANDs that split it in two.
    - An AND makes its interval from an OR of each part.
    - Nodes are shared: one per symbol.
    - Lateral edges chain the nodes of one kind and width, see :func:`_add_lateral`.

    Children are ordered by ascending id, *not* from left to right: an AND may concatenate its parts swapped. The
    published checkpoints have that order. (For grids other than 2 and 4, or without pruning, the published code takes
    the order of a CPython hash table; there is no published checkpoint of that kind.)

    Args:
        grid: number of cells, N.
        pruning: which of two mirrored splits an OR keeps: 0 both, 1 that with the smaller left part, 2 that with the
            larger left part.
        lateral: with lateral edges.

    Raises:
        ValueError: ``grid`` is no positive integer; ``pruning`` is not 0, 1 or 2.
    """
    if not isinstance(grid, int) or isinstance(grid, bool) or grid < 1:
        raise ValueError(f'dims: the number of cells is {grid!r}, but must be a positive integer; AOGNets have 2 and 4')
    if isinstance(pruning, bool) or pruning not in (0, 1, 2):
        raise ValueError(
            f'pruning={pruning!r} is unknown; of two mirrored splits, 0 keeps both, 1 the one with the smaller left '
            'part, 2 the one with the larger left part'
        )
    ids, children = _enumerate(grid, pruning)
    symbols = list(ids)
    laterals: list[list[int]] = [[] for _ in symbols]
    if lateral:
        _add_lateral(ids, AND, laterals, leftwards=False)
        _add_lateral(ids, OR, laterals, leftwards=True)
    order = _post_order([c + e for c, e in zip(children, laterals)])
    paths = _count_paths(children, order)
    parents = [{p for p in range(len(symbols)) if i in children[p] + laterals[p]} for i in range(len(symbols))]
    nodes = tuple(
        Node(
            id=i,
            symbol=symbol,
            children=tuple(children[i]),
            lateral=tuple(laterals[i]),
            residual_lateral=tuple(j for j in laterals[i] if not parents[i] & parents[j]),
            paths=paths[i],
            residual_scale=tuple(paths[i] / paths[child] for child in children[i]),
        )
        for i, symbol in enumerate(symbols)
    )
    return Grammar(grid, nodes, tuple(order))


def _productions(symbol: Symbol, pruning: int) -> list[Symbol]:
    """The grammar: what a node is made of."""
    kind, first, last, split = symbol
    if kind == OR:
        ands = [Symbol(AND, first, last, left) for left in _splits(symbol.width, pruning)]
        return [Symbol(TERMINAL, first, last), *ands]
    if kind == AND:
        return [Symbol(OR, first, first + split - 1), Symbol(OR, first + split, last)]
    return []


def _splits(width: int, pruning: int) -> list[int]:
    """Cells in the left part, for every split that is kept, in order of creation."""
    if pruning == 1:
        return [left for left in range(1, width) if left <= width - left]
    if pruning == 2:
        return [left for left in range(width - 1, 0, -1) if left >= width - left]
    return list(range(1, width))


def _enumerate(grid: int, pruning: int) -> tuple[dict[Symbol, int], list[list[int]]]:
    """Breadth first from the root: the id of every symbol, and the children of every id."""
    root = Symbol(OR, 0, grid - 1)
    ids, children, queue = {root: 0}, {}, deque([root])
    while queue:
        symbol = queue.popleft()
        made_of = _productions(symbol, pruning)
        for part in made_of:
            if part not in ids:
                ids[part] = len(ids)
                queue.append(part)
        children[ids[symbol]] = sorted(ids[part] for part in made_of)
    return ids, [children[i] for i in range(len(ids))]


def _add_lateral(ids: dict[Symbol, int], kind: str, laterals: list[list[int]], leftwards: bool) -> None:
    """Chain the nodes of a kind, one chain per width: each takes its left neighbour, or its right one.

    A width with a single node turns the direction of the next wider chain, and of that one only.
    """
    turn = False
    for width in sorted({symbol.width for symbol in ids if symbol.kind == kind}):
        chain = [symbol for symbol in ids if symbol.kind == kind and symbol.width == width]
        if len(chain) < 2:
            turn = True
            continue
        # An AND stands where its right part begins.
        chain.sort(key=lambda symbol: (symbol.first + symbol.split, symbol.first))
        if leftwards == turn:
            chain.reverse()
        turn = False
        for neighbour, symbol in pairwise(chain):
            laterals[ids[symbol]].append(ids[neighbour])


def _post_order(edges: list[list[int]]) -> list[int]:
    order: list[int] = []

    def visit(i: int) -> None:
        for j in edges[i]:
            if j not in seen:
                seen.add(j)
                visit(j)
        order.append(i)

    seen = {0}
    visit(0)
    return order


def _count_paths(children: list[list[int]], order: list[int]) -> list[int]:
    paths = [0] * len(children)
    paths[0] = 1
    for i in reversed(order):  # parents first
        for child in children[i]:
            paths[child] += paths[i]
    return paths
