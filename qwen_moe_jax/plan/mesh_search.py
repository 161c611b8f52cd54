"""The best mesh and settings for a step: `plan.search` with the target's compiler."""

from collections.abc import Callable, Collection, Iterable, Mapping

from jax.sharding import Mesh

from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.plan.calibration import Calibration
from qwen_moe_jax.plan.compile import Step, chip_for, group_of, plan_step, target_of
from qwen_moe_jax.plan.draft import Outline
from qwen_moe_jax.plan.result import Plan
from qwen_moe_jax.plan.search import Progress, Search, search_meshes
from qwen_moe_jax.plan.settings import RULES, Settings, other_rules, settings_of
from qwen_moe_jax.plan.targets import TargetRequest
from qwen_moe_jax.plan.work import check_rows
from qwen_moe_jax.sharding.mesh import make_mesh


def find_mesh(
    step_on: Callable[[Mesh, Settings], Step],
    request: TargetRequest,
    *,
    fixed: Collection[str] = (),
    axes: Mapping[str, int] | None = None,
    last_resorts: Collection[Settings] = (),
    dtype: str = "bfloat16",
    calibration: Calibration | None = None,
    progress: Callable[[Progress], None],
) -> Search:
    """Searches the meshes of all of the target's devices and, for a step that trains, the settings of `plan.settings`.

    Args:
        step_on: the step on a mesh under settings; without any, as it was asked for. Nothing is allocated.
        request: the target.
        fixed: settings that are not varied.
        axes: sizes of mesh axes that are not varied.
        last_resorts: as `search_meshes` takes it.
        dtype: of the activations.
        calibration: measured speeds; without, a chip's published ones.
        progress: called before each compilation.

    Raises:
        ConfigError: the target's compiler is missing; the calibration is of other devices.
        ShardingError: no mesh divides the model and the batch.
    """
    devices = request.devices()

    def mesh_of(sizes: dict[str, int]) -> Mesh:
        for axis, size in (axes or {}).items():
            if sizes[axis] != size:
                raise ShardingError(f"{axis}={size} was asked for.")
        return make_mesh(**sizes, devices=devices)

    def outline_of(sizes: dict[str, int], settings: Settings | None = None) -> Outline:
        step = step_on(mesh_of(sizes), settings or {})
        check_rows(step.work.rows, sizes, 1)  # of a batch that is fewer rows than devices there are no shards to count
        groups = tuple(group_of(name, tree) for name, tree in step.groups.items())
        return Outline(config=step.config, work=step.work, flops=step.model_flops, groups=groups)

    def others_of(outline: Outline, sizes: Mapping[str, int]) -> Iterable[Outline]:
        return (outline_of(dict(sizes), {RULES: name}) for name in other_rules(outline.work, sizes, fixed))

    def settings_on(outline: Outline, sizes: Mapping[str, int]) -> Iterable[Settings]:
        sparse = outline.config.moe is not None
        return settings_of(outline.work, sizes, request.platform, fixed, sparse=sparse)

    def compile_plan(sizes: dict[str, int], settings: Settings) -> Plan:
        mesh = mesh_of(sizes)
        return plan_step(step_on(mesh, settings), request, mesh, calibration)

    chip = chip_for(request, devices, dtype, calibration)
    networks = () if chip is None else chip.networks
    target = target_of(request, make_mesh(data=len(devices), devices=devices), chip)
    return search_meshes(
        target,
        networks,
        outline_of,
        compile_plan,
        settings_of=settings_on,
        others_of=others_of,
        last_resorts=last_resorts,
        progress=progress,
    )
