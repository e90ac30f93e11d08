"""Counting in programs: loops as often as they run, kernels by their shapes, collectives by their groups."""

import jax
import jax.numpy as jnp
import pytest

from dollar_jax.flops import count_flops
from dollar_jax.hlo import cost

MODULE = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%fused (a: bf16[8,16], b: bf16[16,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,16]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv = bf16[8,16]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x0 = bf16[8,16]{1,0} get-tuple-element(%state), index=1
  %w0 = bf16[4,16]{1,0} constant({...})
  %w = bf16[16,16]{1,0} all-gather(%w0), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %y0 = bf16[8,16]{1,0} fusion(%x0, %w), kind=kOutput, calls=%fused
  ROOT %next = (s32[], bf16[8,16]{1,0}) tuple(%x0, %y0)
}

%condition (state.1: (s32[], bf16[8,16])) -> pred[] {
  %state.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] constant(30)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %q = bf16[2,256,128]{2,1,0} parameter(1)
  %k = bf16[2,512,128]{2,1,0} parameter(2)
  %start = (s32[], bf16[8,16]{1,0}) tuple(%p)
  %loop = (s32[], bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %empty = s8[1,1,1]{2,1,0} constant({...})
  %splash_mha_fwd_no_residuals.1 = bf16[2,256,128]{2,1,0} custom-call(%empty, %q, %k, %k), custom_call_target="t"
  %dot = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %begun = (f32[8,16]{1,0}, f32[8,16]{1,0}) all-reduce-start(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %out = f32[8,16]{1,0} all-reduce-done(%begun)
}
"""


def test_loops_kernels_and_collectives_of_optimised_hlo():
    found = cost(MODULE)
    products = 30 * 2 * 8 * 16 * 16 + 2 * 8 * 8 * 16
    assert found.flops == products + 2 * 2 * 2 * 256 * 512 * 128
    gathered, summed = 16 * 16 * 2 * 3 / 4, 2 * 8 * 16 * 4 / 2
    assert found.collective_bytes == {"all-gather": 30 * gathered, "all-reduce": summed}
    # Results that are written and read: the loop's, the kernel's, the product's, the sum's.
    each_turn = 16 * 16 * 2 + 8 * 16 * 2 + 1
    assert found.memory_bytes == 2 * (30 * each_turn + 2 * 256 * 128 * 2 + 8 * 8 * 4 + 2 * 8 * 16 * 4)


@pytest.mark.parametrize(
    ("instruction", "sent"),
    [
        # A ring of four: each chip sends three quarters of what all of it is, 4 KiB.
        ("f32[256] reduce-scatter(%whole), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add", 3072),
        ("(f32[1024], f32[256]) reduce-scatter-start(%whole), replica_groups={{0,1,2,3},{4,5,6,7}}", 3072),
        ("f32[1024] all-gather(%part), replica_groups=[2,4]<=[8], dimensions={0}", 3072),
        ("(f32[256], f32[1024]) all-gather-start(%part), replica_groups=[2,4]<=[8], dimensions={0}", 3072),
        ("f32[1024] all-reduce(%whole), replica_groups=[2,4]<=[8], to_apply=%add", 2 * 3072),
        ("(f32[1024], f32[256]) all-reduce(%whole, %part), replica_groups=[4,2]<=[8]", 2 * (4096 + 1024) / 2),
        ("f32[1024] all-to-all(%whole), replica_groups=[4,2]<=[8], dimensions={0}", 2048),
        ("f32[1024] collective-permute(%whole), source_target_pairs={{0,1},{1,0}}", 4096),
        ("bf16[1024] collective-permute(%whole), source_target_pairs={{0,1},{1,0}}", 2048),
    ],
)
def test_bytes_that_a_collective_sends(instruction, sent):
    call = instruction.partition(") " if instruction[0] == "(" else " ")[2]
    text = f"""
ENTRY %main (whole: f32[1024], part: f32[256]) -> f32[256] {{
  %whole = f32[1024]{{0}} parameter(0)
  %part = f32[256]{{0}} parameter(1)
  ROOT %out = {instruction}
}}
"""
    kind = call.partition("(")[0].removesuffix("-start")
    assert cost(text).collective_bytes == {kind: sent}


def test_a_tpus_kernel_that_sums_and_cuts_is_a_reduce_scatter():
    text = """
%all-reduce-scatter.clone.1 (input: f32[1024]) -> f32[256] {
  %input = f32[1024]{0} parameter(0)
  %all-reduce.5 = f32[1024]{0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %at = s32[] constant(0)
  ROOT %cut = f32[256]{0} dynamic-slice(%all-reduce.5, %at), dynamic_slice_sizes={256}
}

ENTRY %main (whole: f32[1024]) -> f32[256] {
  %whole = f32[1024]{0} parameter(0)
  ROOT %out = f32[256]{0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.clone.1
}
"""
    assert cost(text).collective_bytes == {"reduce-scatter": 3072}


def test_the_compilers_guess_at_cycles_counts_where_it_is_longer():
    """Of each turn of a loop, and of a fusion, not of what is in it."""
    guess = 'backend_config={{"window_config":{{"estimated_cycles":"{}","is_mask":false}}}}'.format
    text = MODULE.replace("calls=%fused", f"calls=%fused, {guess(7000)}")
    text = text.replace("dim_labels=bf_io->bf", f"dim_labels=bf_io->bf, {guess(90000)}")
    used = cost(text)
    assert used.seconds(1e12, 1e12) == cost(MODULE).seconds(1e12, 1e12) == used.seconds(1e12, 1e12, 1e15)
    own = 2 * 8 * 16 * 16 / 1e12  # of the fusion alone: it multiplies longer than it writes and reads
    assert used.seconds(1e12, 1e12, 1e9) == pytest.approx(used.seconds(1e12, 1e12) + 30 * (7e-6 - own))


@pytest.mark.parametrize(
    "window", ["size=12 stride=11 lhs_dilate=12", "size=12 pad=11_11 rhs_reversal=1"], ids=["dilated", "padded"]
)
def test_a_product_with_batch_axes_that_comes_as_a_convolution(window):
    """12 products of [64, 32] and [32, 16]: a window of 12 of which one place at a time meets data."""
    text = f"""
ENTRY %main (a: f32[64,32,12], b: f32[32,16,12]) -> f32[64,16,12] {{
  %a = f32[64,32,12]{{2,1,0}} parameter(0)
  %b = f32[32,16,12]{{2,1,0}} parameter(1)
  ROOT %c = f32[64,16,12]{{2,1,0}} convolution(%a, %b), window={{{window}}}, dim_labels=bf0_io0->bf0
}}
"""
    assert cost(text).flops == 12 * 2 * 64 * 32 * 16


def test_what_is_written_in_place_is_the_slice_alone():
    text = """
%fused (a: f32[30,8], b: f32[1,8], i: s32[]) -> (f32[30,8], f32[1,8]) {
  %a = f32[30,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %set = f32[30,8]{1,0} dynamic-update-slice(%a, %b, %i, %i)
  %same = f32[30,8]{1,0} bitcast(%set)
  ROOT %both = (f32[30,8], f32[1,8]) tuple(%same, %b)
}

ENTRY %main (p: f32[30,8], q: f32[1,8], k: s32[]) -> f32[30,8] {
  %p = f32[30,8]{1,0} parameter(0)
  %q = f32[1,8]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %kept = (f32[30,8], f32[1,8]) fusion(%p, %q, %k), kind=kLoop, calls=%fused
  %first = f32[30,8]{1,0} get-tuple-element(%kept), index=0
  ROOT %out = f32[30,8]{1,0} dynamic-update-slice(%first, %q, %k, %k)
}
"""
    assert cost(text).memory_bytes == 2 * 2 * 8 * 4, "what a fusion passes on it does not write"


def test_memory_that_is_only_set_aside_is_not_written():
    text = """
ENTRY %main (p: f32[8]) -> (f32[8], f32[30,8]) {
  %p = f32[8]{0} parameter(0)
  %room = f32[30,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %own = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %both = (f32[8], f32[30,8]) tuple(%own, %room)
}
"""
    assert cost(text).memory_bytes == 2 * 8 * 4


def test_a_loop_that_xla_has_unrolled_counts_by_more_than_one():
    """As the product of a sharded kernel with what its neighbours send: two of four turns at a time."""
    text = """
%body (state: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %state = (u32[], f32[8,8]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%state), index=0
  %one = u32[] constant(1)
  %x = f32[8,8]{1,0} get-tuple-element(%state), index=1
  %first = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %second = f32[8,8]{1,0} dot(%first, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sooner = u32[] add(%i, %one)
  %later = u32[] add(%sooner, %one)
  %passed = u32[] copy(%later)
  ROOT %next = (u32[], f32[8,8]{1,0}) tuple(%passed, %second)
}

%condition (state.1: (u32[], f32[8,8])) -> pred[] {
  %state.1 = (u32[], f32[8,8]{1,0}) parameter(0)
  %j = u32[] get-tuple-element(%state.1), index=0
  %end = u32[] constant(4)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (p: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %p = (u32[], f32[8,8]{1,0}) parameter(0)
  ROOT %loop = (u32[], f32[8,8]{1,0}) while(%p), condition=%condition, body=%body
}
"""
    assert cost(text).flops == 4 * 2 * 8**3


def test_products_of_a_jaxpr_count_with_their_loops():
    w = jnp.zeros((16, 16))

    def f(x):
        x, _ = jax.lax.scan(lambda c, _: (jax.checkpoint(lambda y: jnp.sin(y @ w))(c), None), x, length=7)
        return jax.lax.cond(x.sum() > 0, lambda y: y, lambda y: y @ w, x)

    one = 2 * 4 * 16 * 16
    shape = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    assert count_flops(jax.make_jaxpr(f)(shape).jaxpr) == (7 + 1) * one
    # Backward each product is recomputed (7), and meets the cotangent once (w is no argument).
    back = count_flops(jax.make_jaxpr(jax.grad(lambda x: f(x).sum()))(shape).jaxpr)
    assert back == (8 + 7 + 7 + 1) * one


def test_a_convolution_counts_its_kernel_once_per_output():
    def f(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 8, 8, 3), (5, 5, 3, 4)))
    assert count_flops(jax.make_jaxpr(f)(*shapes).jaxpr) == pytest.approx(2 * (2 * 8 * 8 * 4) * (5 * 5 * 3))
