"""What is read out of a compiled program's text, on programs of a few lines."""

import re

import pytest

from train.hlo import arrays, inside, parse, size_in_bytes, steps
from train.hlo_report import Collective, Loop, Work, lines_of, report, warnings_of

FRAMES = """
FileNames
1 "/somewhere/train/step.py"
2 "/somewhere/site-packages/flax/nnx/nn/linear.py"

FunctionNames
1 "train_step"
2 "Linear.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=4 end_column=9}
2 {file_name_id=2 function_name_id=2 line=90 end_line=90 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

"""

FUSIONS = """HloModule jit_train_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}
FRAMES
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%product (p: bf16[8,4], q: bf16[4,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[4,4]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %dot.1 = bf16[8,4]{1,0:T(8,128)(2,1)} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%put (o: f32[8,4], i: s32[3], u: f32[3,4]) -> f32[8,4] {
  %o = f32[8,4]{1,0} parameter(0)
  %i = s32[3]{0} parameter(1)
  %u = f32[3,4]{1,0} parameter(2)
  ROOT %scatter.1 = f32[8,4]{1,0} scatter(%o, %i, %u), to_apply=%add
}

ENTRY %main (x: bf16[8,4]) -> (bf16[8,4], /*index=1*/f32[8,4]) {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %one = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%x), kind=kOutput, calls=%product, \
      metadata={op_name="jit(train_step)/jvp()/dot_general" stack_frame_id=2}, \
      backend_config={"window_config":{"estimated_cycles":"700"}}
  %two = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%one), kind=kOutput, calls=%product, \
      metadata={op_name="jit(train_step)/jvp()/dot_general" stack_frame_id=2}, \
      backend_config={"window_config":{"estimated_cycles":"500"}}
  %three = f32[8,4]{1,0} fusion(%two), kind=kCustom, calls=%put, \
      metadata={op_name="jit(train_step)/transpose(jvp())/scatter-add" stack_frame_id=1}
  %gathered = f32[32,4]{1,0} all-gather(%three), channel_id=1, dimensions={0}
  %four = f32[8,4]{1,0} copy(%three), \
      metadata={op_name="copy.4"}, \
      backend_config={"window_config":{"estimated_cycles":"90"}}
  ROOT %all = (bf16[8,4]{1,0}, /*index=1*/f32[8,4]{1,0}) tuple(%two, %four)
}
""".replace("FRAMES", FRAMES)

LOOPS = """HloModule jit_train_step

%largest (a: u32[], b: u32[]) -> u32[] {
  %a = u32[] parameter(0)
  %b = u32[] parameter(1)
  ROOT %most = u32[] maximum(%a, %b)
}

%put (o: f32[8,4], i: s32[3], u: f32[3,4]) -> f32[8,4] {
  %o = f32[8,4]{1,0} parameter(0)
  %i = s32[3]{0} parameter(1)
  %u = f32[3,4]{1,0} parameter(2)
  ROOT %scatter.1 = f32[8,4]{1,0} scatter(%o, %i, %u), to_apply=%largest
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %array = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %number = s32[] get-tuple-element(%state), index=0
  %next = f32[8,4]{1,0} fusion(%array), kind=kCustom, calls=%put
  ROOT %pair = (s32[], f32[8,4]{1,0}) tuple(%number, %next)
}

%waits (state: (s32[], f32[8,4])) -> pred[] {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %any = u32[] bitcast(%state)
  %told = u32[] all-reduce(%any), channel_id=2, to_apply=%largest
  ROOT %go = pred[] bitcast(%told)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%x)
  %loop.1 = (s32[], f32[8,4]{1,0}) while(%start), condition=%waits, body=%body, \
      metadata={op_name="jit(train_step)/jvp()/while"}
  %begun = f32[8,4]{1,0} all-reduce-start(%x), channel_id=3, to_apply=%largest
  %ended = f32[8,4]{1,0} all-reduce-done(%begun)
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop.1), index=1
}
"""


def entry(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_train_step\n\nENTRY %main (x: f32[8,4]) -> f32[8,4] {{\n{body}\n}}\n"


def test_a_program_is_taken_apart_into_computations_and_instructions():
    module = parse(FUSIONS)
    assert (module.entry, list(module.computations)) == ("main", ["add", "product", "put", "main"])
    last = module.computations["main"][-1]
    assert (last.name, last.opcode, last.shape) == ("all", "tuple", "(bf16[8,4], f32[8,4])")
    fused = module.computations["main"][3]
    assert [each.opcode for each in inside(module, fused)] == ["parameter"] * 3 + ["scatter"] + ["parameter"] * 2 + [
        "add"
    ]


def test_what_a_loop_runs_are_steps_in_it_and_what_a_fusion_holds_are_none():
    found = {step.instruction.name: step.loop and step.loop.name for step in steps(parse(LOOPS))}
    assert {found["next"], found["told"]} == {"loop.1"}
    assert {found["ended"], found["loop.1"]} == {None}
    assert "scatter.1" not in found


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[16,8]", 256),
        ("(s32[4], pred[3])", 19),
        ("s4[5]", 3),
        ("f8e4m3fn[10]", 10),
        ("(f32[0,7], u32[], token[])", 4),
    ],
)
def test_a_shape_has_its_bytes(shape, size):
    assert size_in_bytes(shape) == size
    assert sum(map(size_in_bytes, arrays(shape))) == size


def test_steps_that_are_alike_are_one_row_and_the_slowest_row_is_first():
    found = report(FUSIONS)
    first, second = found.slowest
    # The layer's own file says nothing of where it is used: the line that called it does.
    assert first == Work(2, "fusion: dot", "bf16[8,4]", "forward dot_general step.py:12 train_step", 1200, 256)
    assert second == Work(1, "copy", "f32[8,4]", "what the compiler added", 90, 256)
    assert found.cycles == 1290
    assert found.product_cycles == 1200
    assert report(FUSIONS, most=1).slowest == (first,)


def test_where_no_cycles_are_estimated_the_row_that_moves_most_is_first():
    found = report(re.sub(r'"estimated_cycles":"\d+"', "", FUSIONS))
    assert [(work.what, work.bytes) for work in found.slowest] == [
        ("all-gather", 640),
        ("fusion: dot", 256),
        ("copy", 256),
        ("fusion: scatter", 192),
    ]
    assert (found.cycles, found.launches, found.bytes, found.not_estimated) == (0, 5, 1344, ())
    assert lines_of(found)[1].split()[:5] == ["0", "MB", "19.0%", "2", "times"]
    text = entry('%c = (f32[8], u8[0]) custom-call(%x), custom_call_target="__cudnn$convForward"')
    assert report(text).slowest[0].what == "custom-call: cudnn convForward"


def test_scatters_without_an_estimate_are_listed_and_an_exchange_is_not_taken_for_a_gather():
    (scatter,) = report(FUSIONS).not_estimated
    assert scatter == Work(1, "fusion: scatter", "f32[8,4]", "backward scatter step.py:12 train_step", 0, 192)


def test_exchanges_are_counted_with_their_bytes_and_those_in_loops_apart():
    assert report(FUSIONS).collectives == (Collective("all-gather", False, 1, 512),)
    assert report(LOOPS).collectives == (Collective("all-reduce", False, 1, 128), Collective("all-reduce", True, 1, 4))


def test_a_loop_around_a_scatter_and_one_that_all_chips_wait_in_are_pointed_out():
    found = report(LOOPS)
    assert found.loops == (Loop(1, "forward while", "f32[8,4]", 1, 1),)
    scatter, wait = warnings_of(found)
    assert "around a scatter" in scatter
    assert "all chips wait" in wait
    assert warnings_of(report(FUSIONS)) == []


def test_a_scatter_that_became_a_loop_is_pointed_out():
    text = LOOPS.replace("calls=%put", "calls=%largest").replace("jvp()/while", "transpose(jvp())/scatter-add")
    (loop,) = report(text).loops
    assert (loop.scatters, loop.source) == (1, "backward scatter")


@pytest.mark.parametrize(
    "line",
    [
        "%s = (f32[8], u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true",
        "%r = (f32[8], u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true",
        '%c = f32[8] custom-call(%x), custom_call_target="xla_ffi_python_cpu_callback"',
        "%i = (f32[8], token[]) infeed(%t)",
        "%o = token[] outfeed(%x, %t)",
    ],
)
def test_every_way_to_the_host_is_found(line):
    (call,) = report(entry(line)).host_calls
    assert call.startswith(line.partition("(%")[0].split()[-1])


def test_neither_other_devices_nor_other_calls_are_the_host():
    text = entry(
        "%s = (f32[8], u32[], token[]) send(%x, %t), channel_id=1",
        "%d = token[] send-done(%s), channel_id=1, is_host_transfer=true",
        '%c = s32[8] custom-call(%x), custom_call_target="AssumeGatherIndicesInBound"',
    )
    assert report(text).host_calls == ()
