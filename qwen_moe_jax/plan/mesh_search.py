"""The best mesh for a step: `plan.search` with the target's compiler."""

from collections.abc import Callable

from jax.sharding import Mesh

from qwen_moe_jax.plan.chips import chip_of
from qwen_moe_jax.plan.compile import Step, group_of, plan_step, target_of
from qwen_moe_jax.plan.result import Plan
from qwen_moe_jax.plan.search import Outline, Progress, Search, search_meshes
from qwen_moe_jax.plan.targets import TargetRequest
from qwen_moe_jax.sharding.mesh import make_mesh


def find_mesh(
    step_on: Callable[[Mesh], Step], request: TargetRequest, *, progress: Callable[[Progress], None]
) -> Search:
    """Searches the meshes of all of the target's devices.

    Args:
        step_on: the step on a mesh; nothing is allocated.
        request: the target.
        progress: called before each compilation.

    Raises:
        ConfigError: the target's compiler is missing.
        ShardingError: no mesh divides the model and the batch.
    """
    devices = request.devices()

    def mesh_of(sizes: dict[str, int]) -> Mesh:
        return make_mesh(**sizes, devices=devices)

    def outline_of(sizes: dict[str, int]) -> Outline:
        step = step_on(mesh_of(sizes))
        groups = tuple(group_of(name, tree) for name, tree in step.groups.items())
        return Outline(config=step.config, work=step.work, flops=step.model_flops, groups=groups)

    def compile_plan(sizes: dict[str, int]) -> Plan:
        mesh = mesh_of(sizes)
        return plan_step(step_on(mesh), request, mesh)

    chip = None if request.platform == "cpu" else chip_of(devices[0].device_kind)
    target = target_of(request, make_mesh(data=len(devices), devices=devices))
    return search_meshes(target, () if chip is None else chip.networks, outline_of, compile_plan, progress=progress)
