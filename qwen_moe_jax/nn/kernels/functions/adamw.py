"""The C function of `train.adamw_cpu`: a step of AdamW for one array, whose parameters and moments change in place.

A chunk is some numbers, of which each is read and written once.
"""

from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.llvm.call import CHUNKS, DONE, JOB_FIELDS, NEXT, Operands, write_handler
from qwen_moe_jax.nn.kernels.llvm.code import FLOAT, INT64, Code, Variable
from qwen_moe_jax.nn.kernels.llvm.formats import FLOATS, Format
from qwen_moe_jax.nn.kernels.llvm.vectors import broadcast, multiply_add

#: Numbers that a step has for all elements, float32, in their order in the first argument: what the gradient is
#: multiplied with; each moment's decay and 1 less that; what the moments are multiplied with before the update, for
#: their beginning at zeros; epsilon; the share of a parameter by which it decays; the learning rate; and whether there
#: is a step at all.
(
    CLIP, DECAY_1, NEW_1, DECAY_2, NEW_2, CORRECTION_1, CORRECTION_2, EPSILON, WEIGHT_DECAY, RATE, IS_STEP,
) = range(11)  # fmt: skip
#: Fields of a job after those of every job: the addresses of the numbers, the gradient, parameters and moments; and how
#: many elements there are.
NUMBERS, GRADIENT, PARAMETERS, FIRST, SECOND, SIZE, END = range(JOB_FIELDS, JOB_FIELDS + 56, 8)
#: Elements of a chunk.
SOME = 2**14


def write_adamw(module: ir.Module, format: Format, name: str) -> None:
    """Writes the function of numbers float32 [11], and float32 arrays of one shape: gradient, parameters, two moments.

    Its results are parameters and moments, in the memory of the arguments. Sizes are multiples of `LANES`.
    """
    code = Code(module, "run_chunk", 2, inner=True)
    job, chunk = code.arguments
    fields = (NUMBERS, GRADIENT, PARAMETERS, FIRST, SECOND, SIZE)
    numbers, *arrays, size = (code.read(job, field) for field in fields)
    vectors = [Variable(code, FLOATS, broadcast(code, code.read(numbers, 4 * n, kind=FLOAT))) for n in range(IS_STEP)]
    with code.count((chunk * SOME + SOME).at_most(size), start=chunk * SOME, step=LANES) as element:
        places = [array + element * 4 for array in arrays]
        found = _stepped(code, [vector.get() for vector in vectors], *(code.read(at, kind=FLOATS) for at in places))
        for at, value in zip(places[1:], found, strict=True):
            code.write(at, 0, value)
    code.end()
    write_handler(module, _write_make_job(module), code, name)


def _stepped(code: Code, numbers: list[Any], gradient: Any, parameter: Any, first: Any, second: Any) -> list[Any]:
    """Parameters and moments after the step."""
    builder = code.builder
    gradient = builder.fmul(gradient, numbers[CLIP])
    first = multiply_add(code, gradient, numbers[NEW_1], builder.fmul(first, numbers[DECAY_1]))
    squared = builder.fmul(gradient, gradient)
    second = multiply_add(code, squared, numbers[NEW_2], builder.fmul(second, numbers[DECAY_2]))
    root = _root(code, builder.fmul(second, numbers[CORRECTION_2]))
    update = builder.fdiv(builder.fmul(first, numbers[CORRECTION_1]), builder.fadd(root, numbers[EPSILON]))
    update = multiply_add(code, parameter, numbers[WEIGHT_DECAY], update)
    return [builder.fsub(parameter, builder.fmul(update, numbers[RATE])), first, second]


def _root(code: Code, x: Any) -> Any:
    name, module = f"llvm.sqrt.v{LANES}f32", code.builder.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(FLOATS, [FLOATS]), name)
    return code.builder.call(function, [x])


def _write_make_job(module: ir.Module) -> Code:
    """The job of an XLA_FFI_CallFrame, without its users: without a step, it has no chunks."""
    code = Code(module, "make_job", 1, inner=True)
    operands = Operands(code)
    numbers, gradient = (operands.argument(number) for number in range(2))
    job, size = code.call("malloc", END), operands.size(gradient)
    buffers = [gradient, *(operands.result(number) for number in range(3))]
    for field, buffer in zip((GRADIENT, PARAMETERS, FIRST, SECOND), buffers, strict=True):
        code.write(job, field, operands.data(buffer))
    chunks = Variable(code, INT64, code.integer(0))
    is_step = code.read(operands.data(numbers), 4 * IS_STEP, kind=FLOAT)
    with code.when(code.builder.fcmp_ordered("==", is_step, ir.Constant(FLOAT, 1.0))):
        chunks.set((size + (SOME - 1)) // SOME)
    for field, value in (
        (NEXT, 0), (DONE, 0), (CHUNKS, chunks.get()), (NUMBERS, operands.data(numbers)), (SIZE, size),
    ):  # fmt: skip
        code.write(job, field, value)
    code.end(job)
    return code
