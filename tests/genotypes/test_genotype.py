"""Check which cells are valid, which are equal, and what their drawings show."""

import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from gpipe_jax.genotypes import cell_drawing
from gpipe_jax.genotypes.amoebanet import AMOEBANET_A, AMOEBANET_C, GENOTYPES
from gpipe_jax.genotypes.genotype import OPERATIONS, PAPER_OPERATIONS, Cell, Genotype

ID, SEP, POOL = "identity", "sep_3x3", "max_pool_3x3"

# The eight cells in the notation of Real et al.'s figures, with the output's states at the end.
PUBLISHED = {
    "A": (
        "avg3(0)+max3(0) sep3(1)+id(1) id(0)+avg3(1) sep3(0)+sep5(2) avg3(5)+sep3(0) -> 1346",
        "sep3(1)+avg3(0) max3(0)+sep7(2) max3(1)+max3(0) sep3(4)+1771(0) avg3(1)+sep7(0) -> 23456",
    ),
    "B": (
        "c1(1)+max3(1) id(1)+sep3(0) c1(1)+sep3(0) c1(2)+id(2) avg3(1)+c1(5) -> 0346",
        "max2(0)+max3(0) id(2)+c3(1) dil2sep5(2)+max3(2) id(3)+sep3(1) avg3(4)+c1(3) -> 56",
    ),
    "C": (
        "avg3(0)+sep3(0) id(0)+sep3(0) avg3(2)+sep3(1) id(0)+sep3(1) avg3(3)+sep3(0) -> 12456",
        "max3(0)+max3(0) sep7(2)+sep3(0) sep7(0)+max3(1) sep5(4)+sep5(4) max3(1)+sep3(1) -> 023456",
    ),
    "D": (
        "c1(1)+max3(1) id(1)+1771(0) c1(0)+1771(0) max3(2)+id(2) avg3(1)+c1(5) -> 0346",
        "max2(0)+max3(0) id(2)+c3(1) 1771(2)+max3(2) id(3)+max2(1) avg3(2)+c1(3) -> 456",
    ),
}
SHORT = {
    "id": "identity", "sep3": "sep_3x3", "sep5": "sep_5x5", "sep7": "sep_7x7",
    "avg3": "avg_pool_3x3", "max3": "max_pool_3x3", "max2": "max_pool_2x2", "c1": "conv_1x1",
    "c3": "conv_3x3", "1771": "conv_1x7_7x1", "dil2sep5": "dil_2_sep_5x5",
}  # fmt: skip


def make(pairs: Any, concat: Any) -> Cell:
    """Make a cell from lists, which the types do not allow."""
    return Cell(pairs, concat)


def random_cell(rng: random.Random, pairs: int = 5, operations=OPERATIONS) -> Cell:
    elements = [
        [(rng.choice(operations), rng.randrange(2 + i)) for _ in range(2)] for i in range(pairs)
    ]
    concat = [s for s in range(2 + pairs) if rng.random() < 0.4] or [1 + pairs]
    return make(elements, concat if max(concat) > 1 else [*concat, 1 + pairs])


# --- the published genotypes ---------------------------------------------------------------------


@pytest.mark.parametrize("letter", PUBLISHED)
def test_published_genotypes(letter):
    genotype = GENOTYPES[letter]
    assert genotype.name == f"AmoebaNet-{letter}"
    for cell, written in zip((genotype.normal, genotype.reduction), PUBLISHED[letter], strict=True):
        pairs, concat = written.split(" -> ")
        expected = [
            tuple((SHORT[op], int(state)) for op, state in re.findall(r"(\w+)\((\d)\)", pair))
            for pair in pairs.split()
        ]
        assert cell.pairs == tuple(expected)
        assert cell.concat == tuple(map(int, concat))


def test_published_outputs_are_not_the_unused_states():
    cells = [cell for g in GENOTYPES.values() for cell in (g.normal, g.reduction)]
    differ = [cell for cell in cells if cell.concat != cell.unused()]
    assert len(differ) == 6
    assert AMOEBANET_A.normal.unused() == (3, 4, 6)


def test_only_amoebanet_c_reduces_by_two_equal_max_pools_first():
    """Find claim 1 of US12400121: the reduction cell's first pair pools one hidden state twice."""
    twice = {k for k, g in GENOTYPES.items() if len({*g.reduction.pairs[0]}) == 1}
    assert twice == {"C"}
    assert AMOEBANET_C.reduction.pairs[0] == ((POOL, 0), (POOL, 0))


def test_operations():
    assert len(PAPER_OPERATIONS) == 8 and OPERATIONS[:8] == PAPER_OPERATIONS
    needed = {
        op for g in GENOTYPES.values() for c in (g.normal, g.reduction) for p in c.pairs
        for op, _ in p
    }  # fmt: skip
    assert needed - set(PAPER_OPERATIONS) == set(OPERATIONS[8:])


def test_the_module_loads_no_library():
    code = (
        "import sys; from gpipe_jax.genotypes import amoebanet as g; "
        "str(g.AMOEBANET_A); g.AMOEBANET_A._repr_html_(); "
        "print([m for m in ('jax', 'flax', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- valid cells ------------------------------------------------------------------------------


def test_lists_and_numpy_values_are_frozen():
    pair = [[np.str_(ID), np.int64(0)], (SEP, np.int32(1))]
    cell = make([pair], [np.int64(2), 0])
    assert cell == Cell((((ID, 0), (SEP, 1)),), (2, 0))
    assert hash(cell) == hash(Cell((((ID, 0), (SEP, 1)),), (2, 0)))
    assert {type(cell.pairs[0][0][1]), *map(type, cell.concat)} == {int}
    assert type(cell.pairs[0][0][0]) is str
    with pytest.raises(dataclasses.FrozenInstanceError):
        cell.concat = (2,)  # type: ignore[misc]


def test_unused_states_form_the_output():
    cell = Cell.from_pairs([[(ID, 0), (SEP, 0)], [(ID, 0), (SEP, 2)], [(ID, 0), (ID, 0)]])
    assert cell.concat == cell.unused() == (1, 3, 4)  # the skip input is an unused state, too
    assert Cell.from_pairs([[(ID, 0), (SEP, 1)]]).concat == (2,)


PAIR = ((ID, 0), (SEP, 1))
BAD_CELLS = {
    "later": (
        [PAIR, PAIR, ((ID, 0), (SEP, 5))],
        [4],
        r"pair 2, element 1 reads state 5, but pair 2 computes state 4 .*: use 0 to 3",
    ),
    "own": (
        [((ID, 2), (ID, 0))],
        [2],
        r"pair 0, element 0 reads state 2, but pair 0 computes state 2",
    ),
    "negative": ([((ID, 0), (ID, -1))], [2], r"pair 0, element 1 reads state -1.*: use 0 to 1"),
    "operation": (
        [PAIR, ((ID, 0), ("sep3x3", 1))],
        [3],
        r"pair 1, element 1: unknown operation 'sep3x3'; did you mean 'sep_3x3'\?",
    ),
    "far operation": (
        [(("?", 0), (ID, 0))],
        [2],
        r"pair 0, .*operation '\?'; known: identity, sep_3x",
    ),
    "no operation": ([((None, 0), (ID, 0))], [2], r"pair 0, element 0: unknown operation None"),
    "whole": (
        [((ID, 0.0), (ID, 0))],
        [2],
        r"pair 0, element 0: a state is a whole number, got 0.0",
    ),
    "bool": ([((ID, True), (ID, 0))], [2], r"pair 0, element 0: .* whole number, got True"),
    "no pairs": ([], [2], r"pairs is \(\), but a cell needs at least one pair: add one"),
    "text": ("ab", [2], r"pairs: expected pairs of elements, got 'ab': give a list or a tuple"),
    "one": ([((ID, 0),)], [2], r"pair 0 has 1 elements: a pair sums two"),
    "flat": ([(ID, 0)], [2], r"pair 0, element 0: expected \(operation, state\), got 'identity'"),
    "three items": ([((ID, 0, 1), (ID, 0))], [2], r"pair 0, element 0 has 3 items: give two"),
    "empty": (
        [PAIR],
        [],
        r"concat is \(\), but the output needs a state that a pair computes.*2 to 2",
    ),
    "inputs": ([PAIR], [1, 0], r"concat is \(1, 0\), but the output needs"),
    "missing": ([PAIR], [2, 3], r"concat\[1\] is state 3, but the last state is 2: use 0 to 2"),
    "below": ([PAIR], [2, -1], r"concat\[1\] is state -1, .*: use 0 to 2"),
    "repeated": (
        [PAIR],
        [2, 0, 2],
        r"concat\[2\] is state 2, as is concat\[0\]: name each .* once",
    ),
    "number": ([PAIR], 2, r"concat: expected the states that form the output, got 2"),
    "letter": ([PAIR], [2, "0"], r"concat\[1\]: a state is a whole number, got '0'"),
}


@pytest.mark.parametrize("case", BAD_CELLS)
def test_what_is_not_a_cell(case):
    pairs, concat, message = BAD_CELLS[case]
    with pytest.raises(ValueError, match=message):
        make(pairs, concat)
    whole = json.loads(AMOEBANET_A.to_json())
    whole["reduction"] = {"pairs": pairs, "concat": concat}
    with pytest.raises(ValueError, match="^reduction cell: " + message):
        Genotype.from_json(json.dumps(whole))


def test_the_message_names_the_normal_cell():
    whole = json.loads(AMOEBANET_A.to_json())
    whole["normal"]["concat"] = [7]
    with pytest.raises(ValueError, match=r"^normal cell: concat\[0\] is state 7"):
        Genotype.from_json(json.dumps(whole))


# --- genotypes and JSON --------------------------------------------------------------------------


def test_a_name_is_no_part_of_equality():
    other = dataclasses.replace(AMOEBANET_A, name="mine")
    assert other == AMOEBANET_A and hash(other) == hash(AMOEBANET_A)
    assert Genotype(AMOEBANET_A.reduction, AMOEBANET_A.normal) != AMOEBANET_A


def test_json_round_trip():
    rng = random.Random(0)
    drawn = [Genotype(random_cell(rng, 1 + k), random_cell(rng), f"ä{k}") for k in range(9)]
    for genotype in [*GENOTYPES.values(), *drawn, Genotype(drawn[0].normal, drawn[1].normal)]:
        again = Genotype.from_json(genotype.to_json())
        assert again == genotype and again.name == genotype.name
        assert "\n" not in genotype.to_json()


CELL = {"pairs": [[[ID, 0], [ID, 1]]], "concat": [2]}
BAD_JSON = [
    ("{", r"genotype: not JSON \(.*line 1 column 2.*\): give what to_json returned"),
    ("[]", r"genotype: expected an object with normal, reduction, got \[\]"),
    ({"normal": CELL}, r"genotype: 'reduction' is missing from \['normal'\]: add it"),
    (
        {"normal": CELL, "reduction": CELL, "size": 1},
        r"genotype: unknown key 'size'; known: normal",
    ),
    ({"normal": {"pairs": []}, "reduction": CELL}, r"normal cell: 'concat' is missing"),
    ({"normal": CELL, "reduction": {**CELL, "op": 1}}, r"reduction cell: unknown key 'op'"),
    ({"normal": CELL, "reduction": [1]}, r"reduction cell: expected an object .*, got \[1\]"),
    ({"normal": CELL, "reduction": CELL, "name": 1}, r"name: expected a text, got 1"),
]


@pytest.mark.parametrize(("document", "message"), BAD_JSON)
def test_what_is_not_a_genotype_in_json(document, message):
    text = document if isinstance(document, str) else json.dumps(document)
    with pytest.raises(ValueError, match=message):
        Genotype.from_json(text)


def test_a_genotype_needs_cells():
    with pytest.raises(ValueError, match=r"reduction cell: expected a Cell, got \{.*\}: use Cell"):
        Genotype(AMOEBANET_A.normal, CELL)  # type: ignore[arg-type]


# --- canonical forms -----------------------------------------------------------------------------


def brute_force_form(cell: Cell) -> str:
    """Return the smallest description of the graph, of all ways to number its live pairs."""
    live, before = set(cell.concat), set()
    while live != before:
        before = set(live)
        live |= {source for s in before if s > 1 for _, source in cell.pairs[s - 2]}
    live = sorted(live - {0, 1})
    forms = []
    for names in itertools.permutations(range(2, 2 + len(live))):
        name = {0: 0, 1: 1, **dict(zip(live, names, strict=True))}
        graph = sorted(
            (name[s], sorted((op, name[source]) for op, source in cell.pairs[s - 2])) for s in live
        )
        forms.append((graph, sorted(name[s] for s in cell.concat)))
    return repr(min(forms))


def relabelled(cell: Cell, rng: random.Random) -> Cell:
    """Reorder pairs, elements and concat, and add an unread pair: the graph stays the same."""
    names, pairs, waiting = {0: 0, 1: 1}, [], list(range(2, cell.states))
    while waiting:
        ready = [s for s in waiting if all(source in names for _, source in cell.pairs[s - 2])]
        state = rng.choice(ready)
        pair = [(op, names[source]) for op, source in cell.pairs[state - 2]]
        pairs.append(rng.sample(pair, 2))
        names[state] = 1 + len(pairs)
        waiting.remove(state)
    pairs.append([(rng.choice(OPERATIONS), rng.randrange(cell.states)) for _ in range(2)])
    return make(pairs, rng.sample([names[s] for s in cell.concat], len(cell.concat)))


def mutated(cell: Cell, rng: random.Random, operations) -> Cell:
    """Replace one operation, one source, or one state of the output."""
    pairs = [list(pair) for pair in cell.pairs]
    i, k = rng.randrange(len(pairs)), rng.randrange(2)
    op, source = pairs[i][k]
    concat = set(cell.concat)
    change = rng.randrange(3)
    if change == 0:
        pairs[i][k] = (rng.choice(operations), source)
    elif change == 1:
        pairs[i][k] = (op, rng.randrange(2 + i))
    else:
        concat ^= {rng.randrange(cell.states)}
    return make(pairs, sorted(concat if max(concat, default=0) > 1 else cell.concat))


@pytest.mark.parametrize("operations", [OPERATIONS, [ID, SEP], [ID]])
def test_the_same_graph_has_the_same_canonical_form(operations):
    rng = random.Random(len(operations))
    for _ in range(300):
        cell = random_cell(rng, rng.randint(1, 6), operations)
        other = relabelled(cell, rng)
        assert other.canonical() == cell.canonical()
        assert cell.canonical().canonical() == cell.canonical()


@pytest.mark.parametrize("operations", [[ID, SEP, POOL], [ID]])
def test_a_mutation_changes_the_form_if_it_changes_the_graph(operations):
    rng = random.Random(7)
    outcomes = []
    for _ in range(250):
        cell = random_cell(rng, 5, operations)
        other = mutated(relabelled(cell, rng), rng, operations)
        same = brute_force_form(cell) == brute_force_form(other)
        outcomes.append(same)
        assert (cell.canonical() == other.canonical()) is same, (cell, other)
        assert brute_force_form(cell.canonical()) == brute_force_form(cell)
    assert 50 < sum(outcomes) < 200


def test_the_form_is_exact_on_all_small_cells():
    """Find one form for each graph, in all cells with three pairs of one operation."""
    sources = [list(itertools.combinations_with_replacement(range(2 + i), 2)) for i in range(3)]
    outputs = [c for n in range(1, 6) for c in itertools.combinations(range(5), n) if max(c) > 1]
    forms = set()
    for choice in itertools.product(*sources):
        pairs = [((ID, a), (ID, b)) for a, b in choice]
        forms |= {(brute_force_form(c), c.canonical()) for c in (make(pairs, o) for o in outputs)}
    assert len(forms) == len({graph for graph, _ in forms}) == len({form for _, form in forms})
    assert 1000 < len(forms) < 4000


def test_pairs_that_read_alike_stay_apart():
    """Keep two sums of the same operations: each has its own parameters."""
    alike = [((SEP, 0), (SEP, 0)), ((SEP, 0), (SEP, 0))]
    forms = {
        make(alike, (2,)).canonical(),
        make(alike, (2, 3)).canonical(),
        make([*alike, ((ID, 2), (ID, 3))], (4,)).canonical(),
        make([*alike, ((ID, 2), (ID, 2))], (4,)).canonical(),
        make([*alike, ((ID, 2), (ID, 2))], (3, 4)).canonical(),
        make([*alike, ((ID, 2), (ID, 2))], (2, 4)).canonical(),
    }
    assert len(forms) == 6
    assert make(alike, (3,)).canonical() == make(alike[:1], (2,))


def test_many_equal_pairs_need_few_steps():
    cell = Cell.from_pairs([[(ID, 0), (ID, 1)]] * 30)  # 30! orders
    assert cell.canonical() == cell


def test_the_inputs_and_the_kinds_of_cell_are_not_swapped():
    assert make([((ID, 0), (ID, 0))], (2,)).canonical() != make([((ID, 1), (ID, 1))], (2,))
    a = AMOEBANET_A
    assert a.canonical() == a.canonical().canonical() != Genotype(a.reduction, a.normal).canonical()
    assert a.canonical().name == ""
    assert len({g.canonical() for g in GENOTYPES.values()}) == 4


# --- drawings ------------------------------------------------------------------------------------


def test_text_of_a_genotype():
    cell = make([((ID, 0), ("dil_2_sep_5x5", 1)), ((SEP, 2), (POOL, 0))], (1, 2))
    assert str(Genotype(cell, make([((ID, 0), (ID, 0))], (2,)), "Small")) == (
        "Small\n"
        "h0: the cell's direct input, the output of the cell before it\n"
        "h1: the cell's skip input, the output of the cell before that\n"
        "\n"
        "normal cell\n"
        "  h0 ── identity ──────┐\n"
        "  h1 ── dil_2_sep_5x5 ─┴─ + ── h2 ──▶ h3, output\n"
        "  h2 ── sep_3x3 ───────┐\n"
        "  h0 ── max_pool_3x3 ──┴─ + ── h3 ──▶ nothing\n"
        "  output = concat(h1, h2)\n"
        "\n"
        "reduction cell (stride 2 from h0 and h1)\n"
        "  h0 ── identity ─┐\n"
        "  h0 ── identity ─┴─ + ── h2 ──▶ output\n"
        "  output = concat(h2)"
    )


def test_a_cell_can_be_read_off_its_text():
    rng = random.Random(3)
    for pairs in (1, 5, 12):
        cell = random_cell(rng, pairs)
        *rows, last = str(cell).splitlines()
        read = [re.match(r" +h(\d+) ── (\w+) ─+([┐┴])", row) for row in rows]
        elements = [(m[2], int(m[1])) for m in read if m]
        assert make(list(zip(elements[::2], elements[1::2], strict=True)), cell.concat) == cell
        assert last == f"  output = concat({', '.join(f'h{s}' for s in cell.concat)})"
        assert len({row.index("┐┴"[k % 2]) for k, row in enumerate(rows)}) == 1  # one column


CELLS = {
    **{
        f"{k} {kind}": getattr(g, kind)
        for k, g in GENOTYPES.items()
        for kind in cell_drawing.TITLES
    },
    **{f"random {n}": random_cell(random.Random(n), n) for n in (1, 3, 5, 7, 9)},
    "wide": Cell.from_pairs([[(ID, 0), (ID, 1)]] * 6),
    "deep": Cell.from_pairs([[(ID, i), (SEP, i + 1)] for i in range(6)]),
}


def edge_points(edge: cell_drawing.Edge) -> np.ndarray:
    """Return points [N, 2] on an edge: cubic curves, vertical at their ends."""
    t = np.linspace(0, 1, 40)
    ends = np.array(list(itertools.pairwise(edge.points)))
    (x0, y0), (x1, y1) = ends[:, 0].T[..., None], ends[:, 1].T[..., None]
    x = x0 + (x1 - x0) * (3 * t**2 - 2 * t**3)
    y = y0 * (1 - t) ** 3 + 1.5 * (y0 + y1) * t * (1 - t) + y1 * t**3
    return np.stack([x.ravel(), y.ravel()], axis=1)


@pytest.mark.parametrize("name", CELLS)
def test_in_a_picture_nothing_covers_a_box(name):
    drawn = cell_drawing.picture(CELLS[name].graph, "title")
    for a, b in itertools.combinations(drawn.boxes, 2):
        apart = abs(a.x - b.x) >= (a.width + b.width) / 2 + 5
        assert apart or abs(a.y - b.y) >= cell_drawing.BOX_HEIGHT + 5
    points = np.concatenate([edge_points(edge) for edge in drawn.edges])
    for box in drawn.boxes:
        beside = np.abs(points[:, 0] - box.x) >= box.width / 2 + 5
        outside = (points[:, 1] <= box.y) | (points[:, 1] >= box.y + cell_drawing.BOX_HEIGHT)
        assert (beside | outside).all()
        assert box.width / 2 < box.x < drawn.width - box.width / 2
        assert len(box.text) * 6.6 <= box.width  # DejaVu Sans, 11 pixels
    inside = (points > 0) & (points < [drawn.width, drawn.height])
    assert inside.all()


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_can_be_read_off_its_picture(name):
    cell, drawn = CELLS[name], cell_drawing.picture(CELLS[name].graph, "title")

    def box_at(x: float, y: float, *, end: bool) -> cell_drawing.Box:
        hits = [
            box for box in drawn.boxes
            if abs(box.x - x) < box.width / 2 and box.y + cell_drawing.BOX_HEIGHT * (not end) == y
        ]  # fmt: skip
        return hits[0]

    arrows = [
        (box_at(*edge.points[0], end=False), box_at(*edge.points[-1], end=True))
        for edge in drawn.edges
    ]
    numbers = {box: int(m[1]) for box in drawn.boxes if (m := re.match(r"h(\d+)", box.text))}
    source = {target: numbers[start] for start, target in arrows if start in numbers}
    sums: dict[int, list] = {}
    for start, target in arrows:
        if target in numbers:
            sums.setdefault(numbers[target], []).append((start.text, source[start]))
    output = [numbers[start] for start, target in arrows if target.text.startswith("output")]
    assert {s: sorted(pair) for s, pair in sums.items()} == {
        s: sorted(pair) for s, pair in enumerate(cell.pairs, 2)
    }
    assert sorted(output) == sorted(cell.concat)


def test_boxes_stand_near_what_they_read():
    wide = cell_drawing.picture(CELLS["wide"].graph, "")
    places = {box.text.split()[0]: box.x for box in wide.boxes}
    assert sum(places[f"h{s}"] for s in range(2, 8)) / 6 == pytest.approx(
        (places["h0:"] + places["h1:"]) / 2
    )
    crossed = cell_drawing.picture(Cell((((ID, 1), (SEP, 0)),), (2,)).graph, "")
    places = {box.text: box.x for box in crossed.boxes}
    assert places[SEP] < places["h2 = sum"] < places[ID]  # no edges cross


def test_an_edge_has_the_colour_of_its_state():
    drawn = cell_drawing.picture(AMOEBANET_A.normal.graph, "")
    for edge in drawn.edges:
        for box in drawn.boxes:
            if box.text[0] == "h" and (box.x, box.y + cell_drawing.BOX_HEIGHT) == edge.points[0]:
                assert edge.colour == box.border


def test_html_is_svg_with_all_texts_and_escapes_the_name():
    genotype = dataclasses.replace(AMOEBANET_C, name="<script>&\"'</script>")
    page = ElementTree.fromstring(genotype._repr_html_())
    svg = "{http://www.w3.org/2000/svg}"
    cells = page.findall(f"{svg}svg")
    assert [c.findtext(f"{svg}title") for c in cells] == [
        f"{genotype.name}, {title}" for title in cell_drawing.TITLES.values()
    ]
    for element, cell in zip(cells, (genotype.normal, genotype.reduction), strict=True):
        drawn = cell_drawing.picture(cell.graph, "")
        texts = [t.text for t in element.findall(f"{svg}text")]
        assert texts[1:] == [box.text for box in drawn.boxes]
        assert len(element.findall(f"{svg}rect")) == len(drawn.boxes)
        assert len(element.findall(f"{svg}path")) == 2 * len(drawn.edges)
        starts = [p.get("d", "").split("C")[0] for p in element.findall(f"{svg}path")[::2]]
        assert starts == [
            f"M{x:.1f} {y:.1f}" for (x, y), *_ in (edge.points for edge in drawn.edges)
        ]


@pytest.mark.parametrize("name", ["A", "B", "C", "D", r"a long name, not $\mathematics$" * 3])
def test_in_a_figure_no_texts_overlap(name):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    small = CELLS["random 1"]
    genotype = GENOTYPES.get(name) or Genotype(small, small, name)
    figure = genotype.plot()
    renderer = FigureCanvasAgg(figure).get_renderer()
    extents = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    shown = [text.get_text() for text in figure.axes[0].texts]
    pairs = len(genotype.normal.pairs) + len(genotype.reduction.pairs)
    assert len(shown) == 2 * (1 + 2 + 1) + 3 * pairs  # title, inputs, output; and for each pair
    for a, b in itertools.combinations(extents, 2):
        assert not a.overlaps(b)
    for extent in extents:
        assert 0 < extent.x0 < extent.x1 < figure.bbox.x1 and 0 < extent.y0 < figure.bbox.y1


def test_a_figure_is_written_and_returned(tmp_path):
    from matplotlib import image, pyplot

    figure = AMOEBANET_A.plot(tmp_path / "a.png")
    AMOEBANET_A.plot(str(tmp_path / "plain"))
    picture = image.imread(tmp_path / "a.png")[..., :3]
    assert picture.shape[:2] == pytest.approx(120 * figure.get_size_inches()[::-1], abs=1)
    for colour in cell_drawing.EDGE_COLOURS[:7]:  # of h0 to h6
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(picture - rgb).max(-1) < 0.02).sum() > 20
    assert (tmp_path / "plain").read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []


def test_without_matplotlib_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'gpipe-jax\[examples\]'"):
        AMOEBANET_A.plot()
