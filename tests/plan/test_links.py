"""Bandwidth of collectives on small tori, and the three bounds, against numbers worked out by hand."""

import itertools
import types

import numpy as np
import pytest

from dollar_jax.hlo import Cost, Work, cost, groups
from dollar_jax.plan.chips import CHIPS, Chip
from dollar_jax.plan.links import Links, bounds


def torus(*sizes, halves=1):
    """Devices in the order of their coordinates, the last running fastest, then the halves of a chip."""
    places = itertools.product(*(range(n) for n in (*sizes, *[1] * (3 - len(sizes)))), range(halves))
    return [types.SimpleNamespace(id=i, coords=list(p[:3]), core_on_chip=p[3]) for i, p in enumerate(places)]


def listed(members):
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in members) + "}"


ROWS = listed(np.arange(64).reshape(8, 8))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # The transpose of [[0, 1, 2, 3], [4, 5, 6, 7]], and of [[[0, 1], [2, 3]], [[4, 5], [6, 7]]] in another order.
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        # Of an axis of 8 = 2 × 2 × 2 the part in the middle: numbers that differ by 2.
        ("mesh['axis_0'=8] {'axis_0':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
        ("mesh['a'=4,'b'=2,'c'=1], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_groups_in_every_way_that_hlo_writes_them(text, expected):
    assert groups(text, 8).tolist() == expected


LINE8, RING16, CUBE, HALF_CUBE, SMALL = (8, 8), (16, 16), (4, 4, 4), (4, 4, 2), (2, 2, 1)


@pytest.mark.parametrize(
    ("kind", "sizes", "text", "links"),
    [
        # The end of a line of 8, which is no ring below 16, gets all by one link.
        ("v6e", LINE8, ROWS, 1),
        ("v6e", RING16, "[16,16]<=[256]", 2),
        ("v6e", RING16, "[16,16]<=[16,16]T(1,0)", 2),
        # The corner of a square by two, a place on a torus of two axes by four.
        ("v6e", LINE8, "[1,64]<=[64]", 2),
        ("v5e", RING16, "[1,256]<=[256]", 4),
        # Half a ring is a line.
        ("v6e", RING16, "[32,8]<=[256]", 1),
        # Every second of a ring of 16: a ring, whose links two groups share; of a line, half of one.
        ("v6e", RING16, "[32,8]<=[16,8,2]T(0,2,1)", 1),
        ("v6e", LINE8, "[16,4]<=[8,4,2]T(0,2,1)", 0.5),
        # Cubes are rings along all axes; with one axis of 2 there are none at all.
        ("v5p", CUBE, "[16,4]<=[64]", 2),
        ("v5p", CUBE, "[4,16]<=[64]", 4),
        ("v5p", CUBE, "[1,64]<=[64]", 6),
        ("v5p", CUBE, "[8,8]<=[4,4,2,2]T(0,2,1,3)", 3),  # a ring, and neighbours
        ("v5p", CUBE, "[8,8]<=[4,4,2,2]T(0,3,1,2)", 3),  # a ring, and one of two places that others lie between
        ("v5p", HALF_CUBE, "[1,32]<=[32]", 3),
        ("v5p", HALF_CUBE, "[8,4]<=[4,4,2]T(0,2,1)", 1),
        ("v5p", SMALL, "[1,4]<=[4]", 2),
    ],
)
def test_links_of_a_gathering_group(kind, sizes, text, links):
    one = CHIPS[kind].link_gbps * 1e9
    for collective in ("all-gather", "reduce-scatter", "all-reduce"):
        assert Links(torus(*sizes), CHIPS[kind]).rate(collective, text) == links * one


def test_the_halves_of_a_chip_share_its_links():
    found = Links(torus(4, 4, 4, halves=2), CHIPS["tpu7x"])
    assert found.rate("all-gather", "[64,2]<=[128]") == 600e9  # inside: six links
    assert found.rate("all-gather", "[32,4]<=[16,4,2]T(0,2,1)") == 100e9  # a ring of one half of each chip
    assert found.rate("all-gather", "[16,8]<=[128]") == 200e9
    assert found.rate("collective-permute", "{{0,1},{1,0}}") == 600e9


@pytest.mark.parametrize(
    ("kind", "sizes", "pairs", "busiest"),
    [
        ("v6e", LINE8, [(8 * r + i, 8 * r + (i + 1) % 8) for r in range(8) for i in range(8)], 1),
        # By two on a line of 8: each link carries two, and so it does back from the end.
        ("v6e", LINE8, [(i, (i + 2) % 8) for i in range(8)], 2),
        ("v6e", RING16, [(i, (i + 3) % 16) for i in range(16)], 3),
        # To the other side of a ring: half of them each way round, 16 × 8 hops on 32 links.
        ("v6e", RING16, [(i, (i + 8) % 16) for i in range(16)], 4),
        ("v6e", RING16, [(0, 15)], 1),
        ("v5p", SMALL, [(0, 3), (3, 0)], 1),
    ],
)
def test_a_permutation_waits_for_its_busiest_link(kind, sizes, pairs, busiest):
    found = Links(torus(*sizes), CHIPS[kind]).rate("collective-permute", listed(pairs))
    assert found == CHIPS[kind].link_gbps * 1e9 / busiest


def test_an_exchange_is_held_by_the_middle_of_its_line():
    """Of 8 parts of a buffer 16 pairs' cross the middle of a line of 8 each way; on a ring of 16 64, on two links."""
    line = Links(torus(*LINE8), CHIPS["v6e"]).rate("all-to-all", ROWS)
    assert 7 / 8 / line == pytest.approx(16 / 8 / 100e9)
    ring = Links(torus(*RING16), CHIPS["v6e"]).rate("all-to-all", "[16,16]<=[256]")
    assert 15 / 16 / ring == pytest.approx(64 / 2 / 16 / 100e9)


def test_three_bounds_of_a_program():
    """A chip of 100 TFLOP/s, 1000 GB/s and links of 10 GB/s, as two lines of four."""
    chip, devices = Chip(1.0, 100.0, 1000.0, 10.0, False), torus(2, 4)
    sent = {("all-gather", "[2,4]<=[8]", False): 30e9, ("all-reduce", "[1,8]<=[8]", True): 40e9}
    apart = {Work(100e12, 0.0): 2, Work(0.0, 0.25e12): 4}
    found = bounds(Cost(apart, sent), devices, chip, 150.0)
    parts = {"matrix products": 2.0, "memory": 1.0, "asynchronous collectives": 2.0, "other collectives": 3.0}
    assert found["parts_seconds"] == pytest.approx(parts) and found["bound"] == "collectives"
    times = {"all hidden": 5.0, "as scheduled": 3.0 + 3.0, "nothing hidden": 8.0}
    assert found["seconds"] == pytest.approx(times)
    assert found["mfu"] == pytest.approx({name: 1.5 / seconds for name, seconds in times.items()})
    alone = bounds(Cost(apart, {}), devices, chip, 150.0)
    assert alone["bound"] == "matrix products" and list(alone["seconds"].values()) == [2.0, 3.0, 3.0]
    together = bounds(Cost({Work(100e12, 0.75e12): 2}, {}), devices, chip, 150.0)
    assert list(together["seconds"].values()) == [2.0, 2.0, 2.0], "one instruction reads while it multiplies"


MODULE = """HloModule jit_step, is_scheduled=true, num_partitions=8

%wrapped (a: f32[256]) -> f32[1024] {
  %a = f32[256]{0} parameter(0)
  ROOT %inside = f32[1024]{0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
}

%offloaded (b: f32[512], ready: token[]) -> f32[1024] {
  %b = f32[512]{0} parameter(0)
  %ready = token[] parameter(1)
  ROOT %gathered = f32[1024]{0} all-gather(%b), replica_groups=[4,2]<=[8], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %begun = ((f32[256]), f32[1024], u32[]) async-start(%p), calls=%wrapped
  %done = f32[1024]{0} async-done(%begun), calls=%wrapped
  %half = f32[512]{0} slice(%done), slice={[0:512]}
  %on = ((f32[512], token[]), f32[1024]) call-start(%half), async_execution_thread="sparsecore", to_apply=%offloaded
  %off = f32[1024]{0} call-done(%on)
  %moved = (f32[256], f32[256], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %there = f32[256]{0} collective-permute-done(%moved)
  %same = f32[1024]{0} all-gather(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  ROOT %sum = f32[256]{0} all-reduce(%p), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add
}
"""


FUSED = """HloModule jit_step, is_scheduled=true, num_partitions=4

%begin (a: f32[256]) -> (f32[256], f32[1024]) {
  %a = f32[256]{0} parameter(0)
  %g0 = f32[1024]{0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], backend_config={FIRST}
  ROOT %s = (f32[256]{0}, f32[1024]{0}) custom-call(%g0), custom_call_target="AsyncCollectiveStart"
}

%beside (b: f32[256], c: f32[1024], x: f32[8,4], y: f32[4,16]) -> (f32[8,16], f32[256], f32[1024]) {
  %b = f32[256]{0} parameter(0)
  %c = f32[1024]{0} parameter(1)
  %x = f32[8,4]{1,0} parameter(2)
  %y = f32[4,16]{1,0} parameter(3)
  %z = f32[8,16]{1,0:T(8,128)S(1)} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g1 = f32[1024]{0} all-gather(%b), channel_id=7, replica_groups=[1,4]<=[4], backend_config={LATER}
  ROOT %t = (f32[8,16]{1,0:T(8,128)S(1)}, f32[256]{0}, f32[1024]{0}) tuple(%z, %b, %g1)
}

%end (d: f32[256], e: f32[1024]) -> f32[1024] {
  %d = f32[256]{0} parameter(0)
  %e = f32[1024]{0} parameter(1)
  %g2 = f32[1024]{0} all-gather(%d), channel_id=7, replica_groups=[1,4]<=[4], backend_config={LATER}
  ROOT %u = f32[1024]{0} custom-call(%d, %e, %g2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[256], q: f32[8,4], r: f32[4,16]) -> f32[1024] {
  %p = f32[256]{0} parameter(0)
  %q = f32[8,4]{1,0} parameter(1)
  %r = f32[4,16]{1,0} parameter(2)
  %f0 = (f32[256]{0}, f32[1024]{0}) fusion(%p), kind=kCustom, calls=%begin
  %f1 = (f32[8,16]{1,0:T(8,128)S(1)}, f32[256]{0}, f32[1024]{0}) fusion(%f0, %f0, %q, %r), kind=kOutput, calls=%beside
  ROOT %f2 = f32[1024]{0} fusion(%f1, %f1), kind=kCustom, calls=%end
}
"""


def test_a_gathering_that_fusions_share_counts_once_and_beside_them():
    """As libtpu writes it at its own effort: begun by one fusion, carried on by others beside their own work."""
    text = FUSED
    for name, start in (("FIRST", -1), ("LATER", 2)):
        text = text.replace(name, f'"async_collective_fusion_config":{{"flag_start":"{start}","flag_end":"8"}}')
    found = cost(text)
    assert found.sent == {("all-gather", "[1,4]<=[4]", True): 1024 * 4 * 3 / 4}
    # The product stays in vector memory; what is gathered is written, and its own part with it, where it is begun.
    assert found.work == {Work(0, 2 * 4 * (256 + 1024)): 1, Work(2 * 8 * 16 * 4, 0): 1, Work(0, 0): 1}


def test_what_is_asynchronous_is_told_from_what_is_not():
    """As XLA writes it, and a v7x's compiler for its SparseCores; only what they start writes a result."""
    found = cost(MODULE)
    assert found.work[Work(0, 2 * 4096)] == 3 and max(work.bytes for work in found.work) == 2 * 4096
    assert found.sent == {
        ("all-gather", "[2,4]<=[8]", True): 3072,
        ("all-gather", "[4,2]<=[8]", True): 2048,
        ("collective-permute", "{{0,1},{1,0}}", True): 1024,
        ("all-gather", "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", False): 3072,
        ("all-reduce", "{}", False): 2 * 1024 * 7 / 8,
    }
