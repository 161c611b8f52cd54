"""MaxText's training step as the TPU compiler compiles it, counted as the package's plans are.

    python benchmarks/maxtext_plan.py FOLDER PYTHON qwen3-30b-a3b v5p-128 ici_fsdp_parallelism=8 …

PYTHON is the interpreter of an environment of its own that has MaxText (0.2.5: Python 3.12, jax 0.11.1, libtpu 0.0.46);
no TPU and no weights are needed. There, MaxText's own `train_compile` makes the step for the topology (v5p-128 are 64
chips, v5p-512 are 256) with the settings below, which are those of the package's recipes: one row of 4,096 tokens a
device, bfloat16 over float32 weights and moments, flash attention, megablox kernels. Further words are settings of
MaxText. FOLDER keeps the program's text, and a second call only reads it again.

The text is read by `plan.hlo` and `plan.collectives`, as our own programs' is: grouped products and ragged exchanges at
a balanced load, kernels by what they state. Splash kernels state nothing, and count as causal blocks do in ours.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOKENS = 4096
SETTINGS = (
    "attention=flash sparse_matmul=True megablox=True remat_policy=full dtype=bfloat16 weight_dtype=float32 "
    f"per_device_batch_size=1 max_target_length={TOKENS} dataset_type=synthetic enable_checkpointing=False steps=10 "
    "allow_split_physical_axes=True compile_topology_num_slices=1 run_name=plan base_output_directory=/tmp"
)


def compile_there(folder: str, *settings: str) -> None:
    """In MaxText's environment: compiles its step, and writes program.txt and facts.json."""
    from maxtext.trainers.pre_train import train_compile

    make_mesh, compile_step = train_compile.get_topology_mesh, train_compile.jit_and_compile
    facts: dict[str, object] = {}

    def noted_mesh(config):
        mesh = make_mesh(config)
        facts["mesh"] = {name: int(size) for name, size in mesh.shape.items()}
        return mesh

    def noted_step(*arguments, **keywords):
        began = time.perf_counter()
        compiled = compile_step(*arguments, **keywords)
        memory = compiled.memory_analysis()
        facts["seconds"] = time.perf_counter() - began
        facts["arguments"] = memory.argument_size_in_bytes
        facts["temporaries"] = memory.temp_size_in_bytes
        facts["results"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
        facts["program"] = memory.generated_code_size_in_bytes
        (Path(folder) / "program.txt").write_text(compiled.as_text())
        (Path(folder) / "facts.json").write_text(json.dumps(facts))
        return compiled

    train_compile.get_topology_mesh, train_compile.jit_and_compile = noted_mesh, noted_step
    train_compile.main(["train_compile", *settings])


def report(model: str, folder: Path) -> None:
    """Prints what the program in the folder takes of one v5p chip."""
    import qwen_moe_jax as qmj
    from qwen_moe_jax.attention_kernels.blockwise import Blocks
    from qwen_moe_jax.plan.chips import chip_of
    from qwen_moe_jax.plan.collectives import collectives_of
    from qwen_moe_jax.plan.flops import training_flops_per_token
    from qwen_moe_jax.plan.hlo import Module, Run
    from qwen_moe_jax.plan.roofline import traffic_of

    facts = json.loads((folder / "facts.json").read_text())
    config = qmj.ModelConfig.from_pretrained(ROOT / "configs" / "models" / f"{model}.json")
    attention, balanced = config.attention, TOKENS * config.moe.num_experts_per_tok
    scores = attention.num_attention_heads * len(Blocks.of(TOKENS, 512, None).pairs()) * 512**2
    product = 2.0 * scores * attention.head_dim

    class Counted(Module):
        """Splash kernels by their names, and grouped products, which have no source in this text, by their shapes."""

        def flops(self, run: Run) -> float | None:
            kernel = re.match(r"splash_mha_(fwd|dq|dkv)_", run.instruction.name)
            return product * {"fwd": 2, "dq": 3, "dkv": 4}[kernel[1]] if kernel else super().flops(run)

        def _filled(self, run: Run) -> tuple[int, float]:
            given = self.operand_arrays(run)
            if len(given) < 5 or given[0].shape != () or len(given[1].shape) != 1:
                return 0, 1.0
            rows = max(array.shape[0] for array in given if len(array.shape) == 2)
            experts = given[1].shape[0] - 1
            tile = rows // (given[2].shape[0] - experts + 1)
            return rows, min(1.0, (balanced + (experts - 1) * tile) / rows)

    text, chip = (folder / "program.txt").read_text(), chip_of("TPU v5p")
    module = Counted(text, frozenset({config.num_hidden_layers}), None, balanced)
    collectives = collectives_of(module, facts["mesh"], "tpu")
    traffic = traffic_of(collectives, chip.networks, facts["mesh"])
    wanted = TOKENS * training_flops_per_token(config, TOKENS)
    flops, moved, sent = module.matmul_flops(), module.memory_bytes(), sum(one.bytes for one in traffic)
    compute, memory = (flops or wanted) / chip.peak_flops, moved / chip.memory_bandwidth
    network = sum(one.seconds for one in traffic)
    used = sum(facts[each] for each in ("arguments", "temporaries", "results", "program"))
    mesh = " × ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1)
    print(f"{model}, {mesh}: compiled in {facts['seconds']:.0f} s")
    parts = f"arguments {facts['arguments'] / 1e9:.2f}, temporaries {facts['temporaries'] / 1e9:.2f}"
    print(f"memory {used / 1e9:.2f} GB: {parts}")
    for one in collectives:
        times = 1 if one.count is None else one.count
        if one.bytes * times > sent / 50:
            name = f"{one.kind} over {'+'.join(one.axes)} of {one.dtype} {one.shape}"
            print(f"  {one.bytes * times / 1e9:7.2f} GB {name}, {'?' if one.count is None else times} times")
    print(f"sent {sent / 1e9:.1f} GB; FLOPs {'not known' if flops is None else f'{flops / wanted:.2f} of the model'}")
    print(f"compute {compute:.3f} s, memory {memory:.3f} s ({moved / 1e12:.2f} TB), network {network:.3f} s")
    print(f"share of peak at best {wanted / chip.peak_flops / max(compute, memory, network):.0%}")


def main(folder: str, python: str, model: str, topology: str, *words: str) -> None:
    """Compiles the step unless the folder has it, and prints the report."""
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    if not (where / "facts.json").exists():
        find = "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])"
        base = subprocess.check_output([python, "-c", find], text=True).strip() + "/configs/base.yml"
        settings = [base, *SETTINGS.split(), f"model_name={model}", f"compile_topology={topology}", *words]
        command = [python, str(Path(__file__).resolve()), "--compile", str(where.resolve()), *settings]
        subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}, check=True, cwd=where)
    report(model, where)


if __name__ == "__main__":
    if sys.argv[1] == "--compile":
        compile_there(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
