"""The C function of `attention_kernels.delta_rule_cpu`: one token of each row through convolution and gated delta rule.

A chunk is one row's share of one key head: its channels of the convolution, and the states of its value heads, which
are read and written where they are stored.

Letters of this file besides the package's: C channels; K key heads, and G value heads that share one, N = K * G; H size
of a key head, P of a value head.
"""

from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.llvm.call import CHUNKS, DONE, JOB_FIELDS, NEXT, Operands, write_handler
from qwen_moe_jax.nn.kernels.llvm.code import FLOAT, INT32, INT64, Code, Int, Variable
from qwen_moe_jax.nn.kernels.llvm.formats import FLOATS, Format
from qwen_moe_jax.nn.kernels.llvm.vectors import added, broadcast, constant, folded, multiply_add, silu

#: Taps of the convolution: the token itself and those before it.
TAPS = 4
#: Added to the squared length of queries and keys, under the root (`attention_kernels.delta_rule.EPSILON`).
EPSILON = 1e-6

#: Arguments of the call: what enters the convolution, float32 [B, C], channels grouped by key head, and the same as
#: columns are stored; weights of the taps float32 [TAPS, C]; decay and strength float32 [B, N]; the layer int32 [1];
#: tokens of each row before this int32 [B]; whether this is one int32 [B]; states float32 [L, B, N, H, P]; columns
#: [L, B, TAPS - 1, C]. Results: float32 [B, N, P], states and columns.
INPUTS, STORED_INPUTS, WEIGHTS, DECAY, STRENGTH, LAYER, LENGTHS, COUNTS, STATES, COLUMNS = range(10)

#: Fields of a job: addresses of the buffers (of states and columns, of the layer's), and sizes.
(
    AT_INPUTS, AT_STORED_INPUTS, AT_WEIGHTS, AT_DECAY, AT_STRENGTH, AT_LENGTHS, AT_COUNTS, AT_STATES, AT_COLUMNS,
    AT_RESULTS, CHANNELS, KEY_HEADS, HEADS, KEY_SIZE, VALUE_SIZE, THREADS, END,
) = range(JOB_FIELDS, JOB_FIELDS + 136, 8)  # fmt: skip

#: Numbers of the states of a call from which on a second thread is worth waking.
WORTH_A_THREAD = 2**14
#: Vectors of a state's row that are summed at once: their sums stay in registers.
VECTORS = (8, 4, 1)


def write_delta_rule(module: ir.Module, format: Format, name: str) -> None:
    """Writes the function `name` for columns of a format."""
    write_handler(module, _write_make_job(module, format), _write_run_chunk(module, format), name, THREADS)


def _write_make_job(module: ir.Module, format: Format) -> Code:
    code = Code(module, "make_job", 1, inner=True)
    operands = Operands(code)
    data, dimension = operands.data, operands.dimension
    arguments = [operands.argument(number) for number in range(10)]
    states, inputs = arguments[STATES], arguments[INPUTS]
    rows, channels = dimension(inputs, 0), dimension(inputs, 1)
    heads, key_size, value_size = (dimension(states, axis) for axis in (2, 3, 4))
    key_heads = (channels - heads * value_size) // (key_size * 2)
    layer = code.read(data(arguments[LAYER]), kind=INT32)
    job = code.call("malloc", END)
    for field, argument in (
        (AT_INPUTS, INPUTS), (AT_STORED_INPUTS, STORED_INPUTS), (AT_WEIGHTS, WEIGHTS), (AT_DECAY, DECAY),
        (AT_STRENGTH, STRENGTH), (AT_LENGTHS, LENGTHS), (AT_COUNTS, COUNTS),
    ):  # fmt: skip
        code.write(job, field, data(arguments[argument]))
    columns = layer * rows * channels * ((TAPS - 1) * (format.bits // 8))
    for field, value in (
        (AT_STATES, data(states) + layer * rows * heads * key_size * value_size * 4),
        (AT_COLUMNS, data(arguments[COLUMNS]) + columns), (AT_RESULTS, data(operands.result(0))),
        (CHANNELS, channels), (KEY_HEADS, key_heads), (HEADS, heads), (KEY_SIZE, key_size), (VALUE_SIZE, value_size),
        (CHUNKS, rows * key_heads), (NEXT, 0), (DONE, 0),
    ):  # fmt: skip
        code.write(job, field, value)
    numbers = rows * heads * key_size * value_size
    code.write(job, THREADS, code.select(numbers >= WORTH_A_THREAD, rows * key_heads, 1))
    code.end(job)
    return code


def _write_run_chunk(module: ir.Module, format: Format) -> Code:
    """One row's token through one key head."""
    convolve, normalise, update = _write_convolve(module, format), _write_normalise(module), _write_update(module)
    code = Code(module, "run_chunk", 2, inner=True)
    job, chunk = code.arguments
    fields = CHANNELS, KEY_HEADS, HEADS, KEY_SIZE, VALUE_SIZE
    channels, key_heads, heads, key_size, value_size = (code.read(job, field) for field in fields)
    row, key_head, group = chunk // key_heads, chunk % key_heads, heads // key_heads
    size, head = channels // key_heads, row * heads + key_head * group
    results = code.read(job, AT_RESULTS) + head * value_size * 4
    length, count = (code.read(code.read(job, field) + row * 4, kind=INT32) for field in (AT_LENGTHS, AT_COUNTS))
    with code.builder.if_else(count >= 1) as (token, padding):
        with padding:
            code.call("memset", results, 0, group * value_size * 4)
        with token:
            mixed = code.call("malloc", size * 4)
            code.call(convolve, job, row, key_head * size, size, length, mixed)
            keys, values = mixed + key_size * 4, mixed + key_size * 8
            code.call(normalise, mixed, key_size)
            code.call(normalise, keys, key_size)
            with code.count(group) as number:
                one, numbers = head + number, key_size * value_size
                state = code.read(job, AT_STATES) + one * numbers * 4
                with code.when(length.equals(0)):
                    code.call("memset", state, 0, numbers * 4)
                decay, strength = (code.read(job, field) + one * 4 for field in (AT_DECAY, AT_STRENGTH))
                own = number * value_size * 4
                code.call(update, state, mixed, key_size, value_size, values + own, decay, strength, results + own)
            code.call("free", mixed)
    code.end()
    return code


def _write_convolve(module: ir.Module, format: Format) -> Code:
    """Convolution and activation, and the columns one token later: of (job, row, first channel, how many channels,
    tokens before, address of the results).
    """
    code = Code(module, "convolve", 6, inner=True)
    job, row, first, count, length, results = code.arguments
    channels = code.read(job, CHANNELS)
    size = format.bits // 8
    columns = code.read(job, AT_COLUMNS) + (row * channels * (TAPS - 1) + first) * size
    with code.when(length.equals(0)):
        for tap in range(TAPS - 1):
            code.call("memset", columns + channels * (tap * size), 0, count * size)
    inputs = code.read(job, AT_INPUTS) + (row * channels + first) * 4
    weights = code.read(job, AT_WEIGHTS) + first * 4
    with code.count(count, step=LANES) as channel:
        sum: Any = constant(0.0)
        for tap in range(TAPS):
            if tap < TAPS - 1:
                x = format.read(code, [columns], code.integer(tap), channel, channels, channels)
            else:
                x = code.read(inputs + channel * 4, kind=FLOATS)
            sum = multiply_add(code, x, code.read(weights + (channels * tap + channel) * 4, kind=FLOATS), sum)
        code.write(results + channel * 4, 0, silu(code, sum))
    stored = code.read(job, AT_STORED_INPUTS) + (row * channels + first) * size
    for tap in range(TAPS - 1):
        later = columns + channels * ((tap + 1) * size) if tap < TAPS - 2 else stored
        code.call("memcpy", columns + channels * (tap * size), later, count * size)
    code.end()
    return code


def _write_normalise(module: ir.Module) -> Code:
    """A vector of (address, size), divided by its length."""
    code = Code(module, "normalise", 2, inner=True)
    address, size = code.arguments
    total = Variable(code, FLOATS, constant(0.0))
    with code.count(size, step=LANES) as index:
        x = code.read(address + index * 4, kind=FLOATS)
        total.set(multiply_add(code, x, x, total.get()))
    squared = code.builder.fadd(folded(code, total.get(), added), ir.Constant(FLOAT, EPSILON))
    root = code.builder.call(_sqrt(module), [squared])
    scale = broadcast(code, code.builder.fdiv(ir.Constant(FLOAT, 1.0), root))
    with code.count(size, step=LANES) as index:
        code.write(address + index * 4, 0, code.builder.fmul(code.read(address + index * 4, kind=FLOATS), scale))
    code.end()
    return code


def _sqrt(module: ir.Module) -> Any:
    name = "llvm.sqrt.f32"
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(FLOAT, [FLOAT]), name)


def _write_update(module: ir.Module) -> Code:
    """The rule for one value head: of (address of the state [H, P], that of query and key [2, H], H, P, and the
    addresses of value [P], decay, strength and result [P]).
    """
    code = Code(module, "update", 8, inner=True)
    state, query, key_size, value_size, value, decay, strength, result = code.arguments
    root = code.builder.call(_sqrt(module), [code.builder.sitofp(key_size.value, FLOAT)])
    scale = code.builder.fdiv(ir.Constant(FLOAT, 1.0), root)
    factors = [broadcast(code, x) for x in (code.read(decay, kind=FLOAT), code.read(strength, kind=FLOAT), scale)]
    column = Variable(code, INT64, code.integer(0))
    for vectors in VECTORS:
        with code.loop() as leave_if:
            leave_if(value_size - column.get() < vectors * LANES)
            _write_update_block(code, column.get(), vectors, factors)
            column.set(column.get() + vectors * LANES)
    code.end()
    return code


def _write_update_block(code: Code, column: Int, vectors: int, factors: list[Any]) -> None:
    """`update` of some vectors of columns: one pass reads what the state holds for the key, one writes the state."""
    state, query, key_size, value_size, value, _, _, result = code.arguments
    decay, strength, scale = factors
    builder, key = code.builder, query + key_size * 4

    def at(row: Int, vector: int) -> Int:
        return state + (row * value_size + column + vector * LANES) * 4

    held = [Variable(code, FLOATS, constant(0.0)) for _ in range(vectors)]
    with code.count(key_size) as row:
        weight = broadcast(code, code.read(key + row * 4, kind=FLOAT))
        for vector, sum in enumerate(held):
            sum.set(multiply_add(code, weight, code.read(at(row, vector), kind=FLOATS), sum.get()))
    written = []
    for vector, sum in enumerate(held):
        wanted = code.read(value + (column + vector * LANES) * 4, kind=FLOATS)
        written.append(builder.fmul(strength, builder.fsub(wanted, builder.fmul(decay, sum.get()))))
    read = [Variable(code, FLOATS, constant(0.0)) for _ in range(vectors)]
    with code.count(key_size) as row:
        weight = broadcast(code, code.read(key + row * 4, kind=FLOAT))
        asked = broadcast(code, code.read(query + row * 4, kind=FLOAT))
        for vector, sum in enumerate(read):
            kept = builder.fmul(decay, code.read(at(row, vector), kind=FLOATS))
            updated = multiply_add(code, weight, written[vector], kept)
            code.write(at(row, vector), 0, updated)
            sum.set(multiply_add(code, asked, updated, sum.get()))
    for vector, sum in enumerate(read):
        code.write(result + (column + vector * LANES) * 4, 0, builder.fmul(sum.get(), scale))
