"""Collectives are counted as often as they run, with the bytes they move."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moss_audio_jax.sharding import make_mesh
from train.planning.hlo import Collective, _groups, _rings, collectives, matmul_flops

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%condition (state: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(33)
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %more = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %scattered = bf16[8,16] reduce-scatter(%p), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%moved_on (p: bf16[8,128]) -> bf16[8,128] {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %again = bf16[8,16] reduce-scatter(%p.1), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%state.1), index=1
  %gather = (bf16[8,128]{1,0}, /*index=1*/bf16[64,128]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8]
  %fusion.7 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%fused
  %fusion.8 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%moved_on
  ROOT %next = (s32[], bf16[8,128]{1,0}) tuple(%x, %fusion.7)
}

ENTRY %main (x: bf16[8,128]) -> f32[] {
  %x.1 = bf16[8,128]{1,0} parameter(0)
  %while.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%x.1), condition=%condition, body=%body
  %both = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  ROOT %moved = f32[10]{0} collective-permute(%c), source_target_pairs={{0,1},{1,0}}
}
"""


EIGHT = (tuple(range(8)),)
FOURS = ((0, 1, 2, 3), (4, 5, 6, 7))


def test_a_program_s_collectives():
    assert collectives(PROGRAM, devices=8) == [
        Collective("all-gather", "gather", ("bf16[64,128]",), payload=64 * 128 * 2, devices=8, times=33, groups=EIGHT),
        Collective("reduce-scatter", "scattered", ("bf16[8,16]",), 4 * 8 * 16 * 2, devices=4, times=33, groups=FOURS),
        Collective("all-reduce", "both", ("f32[4]", "bf16[2,3]"), 4 * 4 + 6 * 2, devices=4, times=1, groups=FOURS),
        Collective("collective-permute", "moved", ("f32[10]",), payload=40, devices=2, times=1, groups=((0, 1),)),
    ]


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", ((0, 2), (1, 3))),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0)", ((0, 4), (2, 6), (1, 5), (3, 7))),
        ("replica_groups=[1,4]<=[4]", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['x'=4,'y'=2] {'x'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=mesh['x'=2,'y'=2] {'y','x'}", ((0, 1, 2, 3),)),
        ("dimensions={0}", ((0, 1, 2, 3),)),
    ],
)
def test_who_takes_part(written: str, groups: tuple[tuple[int, ...], ...]):
    assert _groups(written, devices=4) == groups


def test_permutes_run_round_rings():
    assert _rings("source_target_pairs={{0,2},{2,4},{4,0},{1,3},{3,1},{5,5}}") == ((0, 2, 4), (1, 3), (5,))
    assert _rings("source_target_pairs={{0,1},{2,3},{1,2}}") == ((0, 1, 2, 3),)


BETWEEN = """HloModule jit_step, is_scheduled=true, num_partitions=4

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %after-all = token[] after-all()
  %gather = bf16[32,128]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %send.1 = (bf16[8,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%x, %after-all), channel_id=4, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1:3,5}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[8,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%after-all), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:3,5}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send.1), channel_id=4, is_host_transfer=true
  %offloaded = (bf16[8,128]{1,0}, u32[], token[]) send(%x, %after-all), channel_id=9, is_host_transfer=true
  ROOT %received = bf16[8,128]{1,0} get-tuple-element(%recv.1), index=0
}
""".replace("\\\n", "")


def test_what_slices_exchange_goes_through_their_hosts():
    """Four slices, each a program of four devices; other transfers to the host stay there."""
    gather, between = collectives(BETWEEN, devices=16)
    assert gather.groups == ((0, 1, 2, 3),)
    assert between == Collective(
        "all-reduce", "send.1", ("bf16[8,128]",), 2048, devices=4, times=1, between_slices=True
    )
    assert between.sent == 2 * 3 / 4 * 2048


def test_bytes_sent_in_a_ring():
    def sent(kind: str) -> float:
        return Collective(kind, "", (), payload=800, devices=8, times=3).sent

    assert sent("all-gather") == sent("reduce-scatter") == sent("all-to-all") == 3 * 700
    assert sent("all-reduce") == 3 * 1400
    assert sent("collective-permute") == 3 * 800


@pytest.mark.parametrize("layers", [3, 5])
def test_a_compiled_scan_gathers_its_weights_in_every_round(layers: int):
    """On CPU devices, where XLA leaves collectives as they are."""
    mesh = make_mesh(fsdp=8)

    def run(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    weights = jax.ShapeDtypeStruct((layers, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, None, "fsdp")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
    out = NamedSharding(mesh, P("fsdp", None))
    program = jax.jit(run, out_shardings=out).trace(weights, x).lower().compile().as_text()
    found = collectives(program, mesh.size)
    assert found and sum(collective.times for collective in found) % layers == 0
    gathered = [c for c in found if c.kind == "all-gather" and c.payload == 64 * 64 * 4]
    assert all(collective.times == layers for collective in gathered)


def test_matmuls_are_counted_as_often_as_they_run():
    def scan(x, kernels):
        return lax.scan(lambda x, kernel: (x @ kernel, ()), x, kernels)[0]

    compiled = jax.jit(scan).lower(jnp.ones((8, 16)), jnp.ones((5, 16, 16))).compile()
    assert matmul_flops(compiled.as_text()) == 2 * 5 * 8 * 16 * 16
    batched = jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))
    compiled = batched.lower(jnp.ones((3, 40, 50)), jnp.ones((3, 50, 6))).compile()
    assert matmul_flops(compiled.as_text()) == 2 * 3 * 40 * 50 * 6


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 1), "padding": ((1, 1), (0, 3))},
        {"window_strides": (1, 1), "padding": ((2, 0), (7, 7)), "lhs_dilation": (3, 2), "rhs_dilation": (1, 2)},
        {"window_strides": (1, 1), "padding": ((0, 0), (0, 0)), "feature_group_count": 3},
    ],
)
def test_convolutions_are_counted_without_what_is_not_there(options):
    """Of ones with ones, a convolution is the number of its own multiply-adds."""
    x, kernel = jnp.ones((2, 10, 11, 6)), jnp.ones((3, 4, 6 // options.get("feature_group_count", 1), 9))
    convolve = jax.jit(
        lambda x, kernel: lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
    )
    compiled = convolve.lower(x, kernel).compile()
    assert matmul_flops(compiled.as_text()) == 2 * convolve(x, kernel).sum()


def test_a_tpu_s_matmul_is_a_convolution():
    """Heads apart from each other: a window over all of them, which touches one at each position."""
    window = "window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_0oi->b0f"
    program = f"""HloModule jit_step

ENTRY %main (x: bf16[1024,4096,1], kernel: bf16[32,128,4096]) -> bf16[1024,32,128] {{
  %x = bf16[1024,4096,1]{{1,0,2}} parameter(0)
  %kernel = bf16[32,128,4096]{{2,1,0}} parameter(1)
  ROOT %heads = bf16[1024,32,128]{{2,0,1}} convolution(%x, %kernel), {window}
}}
"""
    assert matmul_flops(program) == 2 * 1024 * 4096 * 32 * 128
