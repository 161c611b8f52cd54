"""The rule of imports: arrows point down. A file imports from the packages below its own, never from one above."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: From the top of the house to its ground.
PACKAGES = [
    "train", "__main__", "cli", "server", "plan", "surgery", "inference", "huggingface", "model", "attention_kernels",
    "moe", "nn", "storage", "sharding", "web_page", "whole_file", "text_files", "compilation_cache", "config", "text",
    "units", "rounding", "suggest", "errors",
]  # fmt: skip
#: The two doors through which users find the Hub readers where they look for them: `ModelConfig.from_pretrained` and
#: `CausalLM.from_pretrained`. Both import when called.
DOORS = {("qwen_moe_jax/config/model.py", "huggingface"), ("qwen_moe_jax/model/base.py", "huggingface")}

SOURCES = sorted([*ROOT.glob("qwen_moe_jax/**/*.py"), *ROOT.glob("train/**/*.py")])


def package(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "train":
        return "train"
    return parts[1] if parts[0] == "qwen_moe_jax" and len(parts) > 1 else None


def imported_modules(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where an arrow goes"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path):
    name = path.relative_to(ROOT).as_posix()
    here = package(name.removesuffix(".py").replace("/", "."))
    if here == "__init__":
        return  # the public names come from every package
    for module in imported_modules(path):
        there = package(module)
        if there in PACKAGES and (name, there) not in DOORS:
            assert PACKAGES.index(here) <= PACKAGES.index(there), (
                f"{name} ({here}) imports {module} ({there}), a package above"
            )


def test_configs_and_the_modules_below_need_nothing_but_python():
    """Arguments are parsed, and configs checked, before anybody waits for JAX.

    NumPy is imported by one function, for dtypes that are not given by their names.
    """
    also = {"qwen_moe_jax/config/dtypes.py": {"numpy"}}
    low = PACKAGES[PACKAGES.index("config") :]
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if package(name.removesuffix(".py").replace("/", ".")) in low:
            roots = {module.split(".")[0] for module in imported_modules(path)}
            allowed = {"qwen_moe_jax", *sys.stdlib_module_names, *also.get(name, ())}
            assert roots <= allowed, f"{name} imports {roots}"


def test_the_validator_library_is_imported_where_settings_and_requests_are_checked():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(module.split(".")[0] == "pydantic" for module in imported_modules(path))
    }
    assert found == {"train/config/validate.py", "qwen_moe_jax/server/protocol.py"}


def test_only_huggingface_knows_model_names():
    families = ("qwen2", "qwen3", "mixtral")
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if "huggingface/" in name:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and any(isinstance(part, ast.Constant) for part in ast.walk(node)):
                literals = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                told = [text for text in literals if isinstance(text, str) and text.startswith(families)]
                assert not told, f"{name}:{node.lineno} decides by model name {told}"


def test_private_modules_of_jax_are_used_in_one_file_at_most():
    private = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(module.startswith("jax._src") for module in imported_modules(path))
    ]
    assert set(private) <= {"qwen_moe_jax/sharding/distributed.py"}
