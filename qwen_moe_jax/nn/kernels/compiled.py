"""Compiling C functions for this processor, with llvmlite.

Only `nn.kernels` imports this, where llvmlite is installed.
"""

import functools
from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir

from qwen_moe_jax.compilation_cache import keep, read_kept, source_hash
from qwen_moe_jax.nn.kernels.functions.adamw import write_adamw
from qwen_moe_jax.nn.kernels.functions.attention import write_attention
from qwen_moe_jax.nn.kernels.functions.counting_sort import write_counting_sort
from qwen_moe_jax.nn.kernels.functions.delta_rule import write_delta_rule
from qwen_moe_jax.nn.kernels.functions.flash import write_flash_attention
from qwen_moe_jax.nn.kernels.functions.flash_backward import write_flash_gradients
from qwen_moe_jax.nn.kernels.functions.grouped import Product, write_grouped_matmul
from qwen_moe_jax.nn.kernels.functions.picked import write_picked_matmul
from qwen_moe_jax.nn.kernels.functions.softmax import write_log_softmax, write_softmax_gradient
from qwen_moe_jax.nn.kernels.llvm.formats import FORMATS, Format
from qwen_moe_jax.nn.kernels.llvm.tiles import NUMBERS, Numbers

#: What holds the machine code.
_engines: list[llvm.ExecutionEngine] = []


def _by_tiles(write: Callable[..., None], module: ir.Module, format: Format, name: str) -> None:
    """For a format of floats, by tiles of float32."""
    _, height, vectors = tiles_of("float32")
    write(module, Numbers(format.bits // 8), height, vectors, name)


#: What writes the kernels that come in `FORMATS`, of (module, format, name of the function).
KERNELS: dict[str, Callable[[ir.Module, Format, str], None]] = {
    "picked_matmul": write_picked_matmul,
    "attention": write_attention,
    "delta_rule": write_delta_rule,
    "flash_attention": functools.partial(_by_tiles, write_flash_attention),
    "flash_gradients": functools.partial(_by_tiles, write_flash_gradients),
    "adamw": write_adamw,
    "log_softmax": write_log_softmax,
    "softmax_gradient": write_softmax_gradient,
}


@functools.cache
def kernel(name: str, format: str) -> int:
    """The address of the C function of one of `KERNELS` for one of `FORMATS`."""
    return _compiled(f"{name}-{format}", lambda module, function: KERNELS[name](module, FORMATS[format], function))


@functools.cache
def counting_sort() -> int:
    """The address of the C function of `sorting`."""
    return _compiled("counting_sort", write_counting_sort)


def tiles_of(dtype: str) -> tuple[str, int, int]:
    """How this processor multiplies float32 or bfloat16: one of `NUMBERS`, and rows and vectors of a tile."""
    # Intel's processors multiply pairs slower than as many float32: on Sapphire Rapids at 100 GFLOP/s, where float32
    # runs at 160.
    pairs = dtype == "bfloat16" and "avx512bf16" in _features() and llvm.get_host_cpu_name().startswith("znver")
    # The sums of a tile are in registers, of which there are 32 or, without AVX-512, 16 of half the size.
    return "bfloat16 pairs" if pairs else dtype, *((14, 2) if "avx512f" in _features() else (6, 1))


@functools.cache
def grouped_matmul(product: Product, numbers: str, height: int, vectors: int) -> int:
    """The address of the C function of `matmul` for one of its products, and for one of `NUMBERS`."""
    write = functools.partial(write_grouped_matmul, product=product, numbers=NUMBERS[numbers], height=height)
    name = f"{product}-{numbers}-{height}x{vectors}"
    return _compiled(name, lambda module, function: write(module, vectors=vectors, name=function))


def _features() -> set[str]:
    """Instructions that this processor has, by LLVM's names."""
    return {name for name, present in llvm.get_host_cpu_features().items() if present}


def _compiled(name: str, write: Callable[[ir.Module, str], None]) -> int:
    """The address of a C function that is written by its name into a module.

    Its machine code is kept by `name` for the next start where the compilation cache is in use.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    file = f"{name.replace(' ', '_')}-{source_hash()[:16]}.o"
    machine_code = read_kept("kernels", file)
    if machine_code is None:
        machine_code = _machine_code(write, machine)
        keep("kernels", file, machine_code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address("handler")


def _machine_code(write: Callable[[ir.Module, str], None], machine: llvm.TargetMachine) -> bytes:
    module = ir.Module("kernels")
    module.triple = llvm.get_process_triple()
    write(module, "handler")
    code = llvm.parse_assembly(str(module))
    code.verify()
    _optimise(code, machine)
    return machine.emit_object(code)


def _optimise(code: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Variables become registers. The loops are written as they should run: LLVM's own pipeline takes ten times longer
    and makes them no faster.
    """
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    for function in code.functions:
        if not function.is_declaration:
            passes.run(function, builder)
