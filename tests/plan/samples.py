"""Plans by hand: of the form and size that a real one has, with invented numbers."""

import dataclasses

from qwen_moe_jax.plan.result import (
    AxisTraffic,
    Collective,
    CompileCost,
    Flops,
    Group,
    Memory,
    Model,
    PlacedArray,
    Plan,
    Remark,
    Roofline,
    Target,
    Work,
)

GB = 10**9


def placed(name, shape, spec, size, dtype="bfloat16"):
    return PlacedArray(name=name, shape=shape, dtype=dtype, spec=spec, bytes=size)


PARAMETERS = Group(
    name="parameters",
    arrays=(
        placed("model.embed_tokens.weight", (151936, 4096), (("tensor",), ("fsdp", "expert")), 9723904),
        placed(
            "model.layers.segments.0.0.mlp.experts.gate_proj",
            (94, 128, 1536, 4096),
            ((), ("expert",), ("tensor",), ("fsdp",)),
            1182793728,
        ),
        placed("model.layers.segments.0.0.mlp.router.weight", (94, 128, 4096), ((), (), ()), 98566144),
    ),
)
MOMENTS = Group(
    name="optimizer state",
    arrays=(
        *(dataclasses.replace(array, name=f"mu.{array.name}") for array in PARAMETERS.arrays),
        placed("count", (), (), 4, "int32"),
    ),
)
BATCH = Group(
    name="batch", arrays=(placed("tokens_BT", (256, 4096), (("data", "fsdp", "expert"), ()), 65536, "int32"),)
)


def collective(kind="all-gather", axes=("fsdp",), **changes):
    fields = dict(
        kind=kind,
        axes=axes,
        devices=16,
        dtype="bf16",
        shape=(16, 1536, 4096),
        bytes=188743680,
        count=188,
        in_layers=True,
        widened_from=None,
        source="layers/mlp/experts/gather",
    )
    return Collective(**{**fields, **changes})


def memory(**changes):
    fields = dict(
        groups=(PARAMETERS, MOMENTS, BATCH),
        padding=3_000_000,
        gradients=2 * GB,
        outputs=40_000,
        temporaries=30 * GB,
        code=210_000_000,
        needed=None,
        available=102 * GB,
    )
    return Memory(**{**fields, **changes})


def roofline(**changes):
    fields = dict(
        compute=1.9,
        memory=0.31,
        memory_bytes=857 * GB,
        traffic=(
            AxisTraffic(axes=("fsdp",), bytes=212 * GB, bandwidth=200e9, network="ICI", seconds=1.06),
            AxisTraffic(axes=("expert",), bytes=251 * GB, bandwidth=200e9, network="ICI", seconds=1.255),
            AxisTraffic(axes=("fsdp", "expert"), bytes=9 * GB, bandwidth=200e9, network="ICI", seconds=0.045),
        ),
        network=2.36,
        bound="network",
        seconds=2.36,
        seconds_without_overlap=4.57,
        tokens_per_second=444_000.0,
        utilisation=0.52,
    )
    return Roofline(**{**fields, **changes})


def plan(**changes):
    """A training step that fits, on 256 devices, two axes of which are used."""
    fields = dict(
        target=Target(
            name="tpu:v5p:4x8x8",
            platform="tpu",
            chip="TPU v5p",
            devices=256,
            memory_bytes=102 * GB,
            peak_flops=459e12,
            memory_bandwidth=2765e9,
        ),
        mesh={"data": 1, "fsdp": 32, "expert": 8, "tensor": 1},
        model=Model(
            name="Qwen/Qwen3-235B-A22B",
            model_type="qwen3_moe",
            parameters=235_093_634_560,
            active_parameters=22_191_636_480,
            layers=94,
            sparse_layers=94,
            experts=128,
            experts_per_token=8,
        ),
        work=Work(
            purpose="train",
            rows=256,
            tokens_per_row=4096,
            context=0,
            accumulation_steps=1,
            dtype="bfloat16",
            param_dtype="float32",
            sharding="expert+fsdp",
            execution={"dispatch": "dropless", "remat": "full", "exchange": "all_to_all", "group_size": None},
        ),
        memory=memory(),
        flops=Flops(model=1.6e17, program=2.1e17),
        collectives=(
            collective("all-to-all", ("expert",), count=564, devices=8, bytes=445_000_000, source="moe/dispatch"),
            collective(),
            collective("reduce-scatter", in_layers=True, count=94),
            collective(
                "all-reduce", ("fsdp", "expert"), devices=256, shape=(), bytes=8, count=3, in_layers=False, source=""
            ),
        ),
        roofline=roofline(),
        remarks=(
            Remark(about="replicated", text="The routers, 98.57 MB, are replicated on every device."),
            Remark(
                about="flops", text="The program computes 1.31 times what the model asks for: remat “full” recomputes."
            ),
        ),
        refusal=None,
        cost=CompileCost(trace_seconds=6.1, compile_seconds=71.5, peak_host_bytes=3_100_000_000),
        versions={"jax": "0.10.2", "libtpu": "0.0.42.1"},
    )
    return Plan(**{**fields, **changes})


def refused():
    """One that the compiler does not take, and says how much it would need."""
    return plan(
        memory=memory(temporaries=None, padding=None, outputs=None, code=None, needed=131 * GB),
        refusal="RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.",
        roofline=None,
        collectives=(),
        flops=Flops(model=1.6e17, program=None),
    )


def group_named(name):
    """A group whose name and array are called so."""
    return Group(name=name, arrays=(placed(name, (8,), ((),), 16, name),))
