"""Read compiled programs: one written by hand, and one of the CPU's compiler."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import gpipe_jax as gpipe
from gpipe_jax.tpu_compiler import hlo

COST = 'backend_config={"window_config":{"estimated_cycles":"%d","x":0}}'
MODULE = f"""HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0:T(256)}} parameter(0)
  ROOT %m = f32[8]{{0:T(256)}} multiply(%p, %p), {COST % 999}
}}

%inner_body (c: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %c = (s32[]{{:T(256)}}, f32[8]{{0:T(256)}}) parameter(0)
  %ci = s32[]{{:T(256)}} get-tuple-element(%c), index=0
  %one = s32[]{{:T(256)}} constant(2)
  %next = s32[]{{:T(256)}} add(%ci, %one)
  %cx = f32[8]{{0:T(256)}} get-tuple-element(%c), index=1
  %cy = f32[8]{{0:T(256)}} fusion(%cx), kind=kLoop, calls=%fused, {COST % 10}
  %start = (f32[8]{{0}}, f32[8]{{0}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) \
collective-permute-start(%cy), source_target_pairs={{{{0,1}},{{1,0}}}}
  %done = f32[8]{{0}} collective-permute-done(%start)
  ROOT %r = (s32[]{{:T(256)}}, f32[8]{{0:T(256)}}) tuple(%next, %done)
}}

%inner_condition (d: (s32[], f32[8])) -> pred[] {{
  %d = (s32[]{{:T(256)}}, f32[8]{{0:T(256)}}) parameter(0)
  %di = s32[]{{:T(256)}} get-tuple-element(%d), index=0
  %limit = s32[]{{:T(256)}} constant(7)
  ROOT %lt = pred[]{{:T(1024)}} compare(%di, %limit), direction=LT, {COST % 1}
}}

%outer_body (o: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %o = (s32[]{{:T(256)}}, f32[8]{{0:T(256)}}) parameter(0)
  %zero = s32[]{{:T(256)}} constant(1)
  %copied = s32[]{{:T(256)}} copy(%zero)
  %ox = f32[8]{{0:T(256)}} get-tuple-element(%o), index=1
  %t = (s32[]{{:T(256)}}, f32[8]{{0:T(256)}}) tuple(%copied, %ox)
  ROOT %w = (s32[]{{:T(256)}}, f32[8]{{0:T(256)}}) while(%t), condition=%inner_condition, \
body=%inner_body
}}

%outer_condition (e: (s32[], f32[8])) -> pred[] {{
  %e = (s32[]{{:T(256)}}, f32[8]{{0:T(256)}}) parameter(0)
  ROOT %yes = pred[]{{:T(1024)}} constant(true)
}}

%small (s: f32[8]) -> f32[8] {{
  ROOT %s = f32[8]{{0:T(256)}} parameter(0)
}}

%large (l: f32[8]) -> f32[8] {{
  %l = f32[8]{{0:T(256)}} parameter(0)
  ROOT %lf = f32[8]{{0:T(256)}} fusion(%l), kind=kLoop, calls=%fused, {COST % 1000}
}}

ENTRY %main (a: f32[8], b: pred[]) -> f32[8] {{
  %a = f32[8]{{0:T(256)}} parameter(0)
  %b = pred[]{{:T(1024)}} parameter(1)
  %nought = s32[]{{:T(256)}} constant(0)
  %init = (s32[]{{:T(256)}}, f32[8]{{0:T(256)}}) tuple(%nought, %a)
  %outer = (s32[]{{:T(256)}}, f32[8]{{0:T(256)}}) while(%init), condition=%outer_condition, \
body=%outer_body, backend_config={{"known_trip_count":{{"n":"5"}}}}
  %ax = f32[8]{{0:T(256)}} get-tuple-element(%outer), index=1
  %chosen = f32[8]{{0:T(256)}} conditional(%b, %ax, %ax), true_computation=%small, \
false_computation=%large
  %sum = (f32[8]{{0:T(256)}}, bf16[4,2]{{1,0}}) all-reduce(%chosen, %ax), channel_id=1, \
to_apply=%small
  ROOT %out = f32[8]{{0:T(256)}} get-tuple-element(%sum), index=0, {COST % 100}
}}
"""


def test_cycles_follow_loops_and_the_slowest_branch() -> None:
    """Count the inner loop (1, 3, 5) thrice; a fusion's cycles include those inside it."""
    assert hlo.Module(MODULE).cycles() == 5 * 3 * (10 + 1) + 1000 + 100


def test_loops_with_their_trip_counts() -> None:
    assert hlo.Module(MODULE).loops() == [
        hlo.WhileLoop("outer_body", 5, 5, 0),
        hlo.WhileLoop("inner_body", 3, 15, 1),
    ]


def test_a_loop_of_unknown_length_counts_once() -> None:
    unknown = MODULE.replace("constant(7)", "parameter(1)")
    assert hlo.Module(unknown).loops()[1] == hlo.WhileLoop("inner_body", None, 5, 1)
    assert hlo.Module(unknown).cycles() == 5 * (10 + 1) + 1000 + 100
    assert hlo.Module(MODULE.replace("direction=LT", "direction=NE")).loops()[1].trips is None


def test_a_bound_that_the_loop_carries() -> None:
    """Follow constants that the TPU compiler moved out of a loop: the loop carries them."""
    carried = MODULE.replace(
        "s32[]{:T(256)} constant(7)", "s32[]{:T(256)} get-tuple-element(%d), index=2"
    )
    carried = carried.replace("tuple(%copied, %ox)", "tuple(%copied, %ox, %bound)")
    carried = carried.replace("  %zero =", "  %bound = s32[]{:T(256)} constant(9)\n  %zero =")
    assert hlo.Module(carried).loops()[1].trips == 4


def test_a_condition_inside_a_fusion() -> None:
    """Map the parameters of the fusion to the operands of the instruction that calls it."""
    fused = MODULE.replace(
        "compare(%di, %limit), direction=LT", "fusion(%limit, %di), kind=kLoop, calls=%compared"
    )
    compared = """%compared (x: s32[], y: s32[]) -> pred[] {
  %y = s32[] parameter(1)
  %x = s32[] parameter(0)
  ROOT %less = pred[] compare(%y, %x), direction=LE
}

"""
    fused = fused.replace("%inner_condition (", f"{compared}%inner_condition (", 1)
    assert hlo.Module(fused).loops()[1].trips == 4  # the counter is 1, 3, 5, 7


def test_collectives_inside_and_outside_of_loops() -> None:
    inside, outside = (
        [c for c in hlo.Module(MODULE).collectives() if c.in_loop is where]
        for where in (True, False)
    )
    assert inside == [hlo.Collective("collective-permute", 32, True, True, 15)]
    assert outside == [hlo.Collective("all-reduce", 32 + 16, False, False, 1)]


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("  %a = f32[4,4]{1,0} all-gather(%b), dimensions={0}", 64),
        ("  %a = (f32[1,4]{1,0}, f32[4,4]{1,0}) all-gather-start(%b), dimensions={0}", 64),
        ("  %a = (f32[8]{0}, bf16[8]{0}) all-reduce-start(%b, %c), to_apply=%add", 48),
        ("  %a = pred[3]{0} collective-permute(%b)", 3),
        ("  %a = f32[] all-reduce(%b), to_apply=%add", 4),
    ],
)
def test_bytes_are_those_of_the_results(line: str, size: int) -> None:
    text = f"ENTRY %main (b: f32[]) -> f32[] {{\n{line}\n}}\n"
    assert [c.bytes for c in hlo.Module(text).collectives()] == [size]


def test_a_program_of_the_cpu_compiler() -> None:
    mesh = gpipe.make_mesh(stages=4)

    def ring(x: jax.Array) -> jax.Array:
        pairs = [(i, (i + 1) % 4) for i in range(4)]
        y = jax.lax.fori_loop(0, 6, lambda _, y: jax.lax.ppermute(jnp.sin(y), "stage", pairs), x)
        return jax.lax.psum(y, "stage")

    f = jax.jit(jax.shard_map(ring, mesh=mesh, in_specs=P("stage"), out_specs=P()))
    text = f.lower(jnp.ones((4, 3))).compile().as_text() or ""
    module = hlo.Module(text)
    assert [loop.trips for loop in module.loops()] == [6]
    collectives = {c.kind: (c.bytes, c.in_loop, c.times) for c in module.collectives()}
    assert collectives == {"collective-permute": (12, True, 6), "all-reduce": (12, False, 1)}
    assert module.entry in module.computations


def test_thousands_of_instructions() -> None:
    """Read as many instructions as a network without repetition has."""
    line = f"  %f = f32[8]{{0}} fusion(%a), kind=kLoop, calls=%fused, {COST % 1}\n"
    text = MODULE.replace("  %nought", line * 20_000 + "  %nought")
    assert hlo.Module(text).cycles() == hlo.Module(MODULE).cycles() + 20_000


def test_an_empty_text() -> None:
    assert hlo.Module("").cycles() == 0
    assert hlo.Module("").collectives() == hlo.Module("").loops() == []
