"""Compiling the C functions of `picked_matmul` for this processor, with llvmlite.

Only `nn.kernels` imports this, where llvmlite is installed.
"""

import functools

import llvmlite.binding as llvm
from llvmlite import ir

from qwen_moe_jax.nn.kernels.formats import FORMATS
from qwen_moe_jax.nn.kernels.handler import write_handler

#: What holds the machine code.
_engines: list[llvm.ExecutionEngine] = []


@functools.cache
def c_function(format: str) -> int:
    """The address of the C function for one of `FORMATS`."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = ir.Module(f"picked_matmul_{format}")
    module.triple = llvm.get_process_triple()
    write_handler(module, FORMATS[format], "handler")
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    code = llvm.parse_assembly(str(module))
    code.verify()
    _optimise(code, machine)
    engine = llvm.create_mcjit_compiler(code, machine)
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address("handler")


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
