"""Which way imports point. Data walks text -> tokens -> model -> decoder -> text, and so do these arrows."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Each package may import, of djax, only from these (and from itself).
ALLOWED = {
    "djax/errors.py": "",
    "djax/checks.py": "errors",
    "djax/pytree.py": "checks errors",
    "djax/files.py": "errors",
    "djax/private.py": "errors",
    "djax/process.py": "errors",
    "djax/programs.py": "",
    "djax/interrupt.py": "",
    "djax/cache_entries.py": "files",
    "djax/checkpoint_files.py": "errors files",
    "djax/consistency.py": "checkpoint_files errors",
    "djax/tokenizer_files.py": "checkpoint_files consistency errors files",
    "djax/compilation.py": "cache_entries checks errors private",
    "djax/prompts.py": "checks errors",
    "djax/bounded_jinja.py": "",
    "djax/chat_template.py": "bounded_jinja errors",
    "djax/text.py": "chat_template checks errors prompts tokenizer_files",
    "djax/kernels": "errors files kernels private sharding",
    "djax/models": "convert errors kernels models process sharding",
    "djax/decoding": "checks decoding errors kernels.vocabulary pytree",
    "djax/caching": "caching checks decoding.contract pytree",
    "djax/smoothing.py": "checks pytree",
    "djax/trace.py": "",
    "djax/options.py": "caching.contract decoding smoothing",
    "djax/stop.py": "checks errors",
    "djax/plugs.py": "checks errors",
    "djax/plug_files.py": "caching checks decoding errors plugs smoothing",
    "convert": "checkpoint_files convert directories errors files",
    "djax/directories.py": "checks errors",
    "djax/source.py": "checkpoint_files consistency convert errors files models sharding text",
    "djax/sharding.py": "checks errors process",
    "djax/model.py": (
        "checks compilation errors kernels.choice models.family models.quantized models.sight process programs prompts sharding"
    ),
    "djax/program.py": (
        "caching.contract decoding.contract decoding.not_before kernels.choice kernels.sight models.family models.layers "
        "models.sight process smoothing trace"
    ),
    "djax/checkpoint.py": "checks convert directories errors model models process sharding source",
    "djax/conversion.py": "checkpoint convert directories errors files process source",
    "djax/request.py": (
        "caching checks decoding errors kernels.choice model options plugs process program pytree smoothing stop text"
    ),
    "djax/generate.py": ("compilation errors model options process program programs pytree request sharding stop text trace"),
    "djax/engine.py": ("checks compilation errors generate model options process program programs request"),
    "djax/explain.py": ("checks decoding.contract errors generate kernels.dispatch model options process program request"),
    "djax/ahead.py": ("checks compilation directories errors generate kernels.choice model options process program request"),
    "djax/presets.py": "caching checks configs decoding errors options pytree smoothing",
    "djax/pictures": "errors files pictures",
    "djax/cli": (
        "benchmarks checkpoint checks cli compilation configs conversion distill errors files "
        "interrupt options pictures plug_files plugs presets training"
    ),
    "djax/distill": (
        "caching checkpoint checks compilation decoding distill errors files generate model "
        "kernels.sight models.family models.sight options plugs process pytree smoothing "
        "source training"
    ),
    "djax/training": (
        "checkpoint checks compilation directories errors files generate kernels.choice kernels.sight model "
        "models options process sharding text training"
    ),
}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "djax")


def test_the_arrows():
    for place, allowed in ALLOWED.items():
        files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
        assert files, place
        for file in files:
            for name in imported(file):
                if name.startswith("djax."):
                    target = name.removeprefix("djax.")
                    allows = any(target == module or target.startswith(f"{module}.") for module in allowed.split())
                    assert allows, f"{file.relative_to(ROOT)} imports {name}"


# What only djax/kernels may name: how a program asks for its platform, and what it calls there.
OF_KERNELS = set("ffi pallas triton native platform_dependent default_backend why_not DJAX_KERNELS".split())
PLATFORMS = set("cpu gpu cuda rocm tpu".split())
# What says for which platform a program is made, or that a command computes on none but a CPU.
NAMES_PLATFORMS = {"djax/ahead.py": PLATFORMS | {"default_backend"}, "djax/cli": {"cpu"}}


def named(file):
    """Every identifier and every string of a file but its docstrings and texts for people, which hold spaces."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword | ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_only_kernels_name_a_back_end():
    files = [file for file in (ROOT / "djax").rglob("*.py") if ROOT / "djax/kernels" not in file.parents]
    for file in files:
        place = file.relative_to(ROOT).as_posix()
        may = set().union(*(names for start, names in NAMES_PLATFORMS.items() if place.startswith(start)))
        assert not ((OF_KERNELS | PLATFORMS) - may) & set(named(file)), place
    kernels = set().union(*(named(file) for file in (ROOT / "djax/kernels").rglob("*.py")))
    assert set("ffi pallas native platform_dependent default_backend DJAX_KERNELS cpu cuda".split()) <= kernels


def test_flax_lives_in_models_and_where_trees_are_read():
    users = {f.relative_to(ROOT).as_posix() for f in (ROOT / "djax").rglob("*.py") if any("flax" in n for n in imported(f))}
    assert users == {
        "djax/models/family.py",
        "djax/models/transformer.py",
        "djax/models/llada2.py",
        "djax/source.py",
        "djax/checkpoint.py",
        "djax/ahead.py",
        "djax/distill/lora.py",
    }


def test_djax_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import djax; djax.load(); print('torch' in str(sys.modules.get('torch')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_no_torch_or_pickle_in_the_source():
    for file in [*(ROOT / "djax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]:
        assert not {"torch", "pickle"} & {n.split(".")[0] for n in imported(file)}, file
        assert "trust_remote_code=True" not in file.read_text()


def test_the_choice_of_kernels_is_read_at_public_doors_alone():
    """Never by what is traced, whose program it would change behind the back of the caches' keys."""
    readers = {"read_choice", "with_wanted_kernels"}
    found = {f.relative_to(ROOT).as_posix() for f in (ROOT / "djax").rglob("*.py") if readers & set(named(f))}
    assert found == {"djax/kernels/choice.py", "djax/model.py", "djax/request.py", "djax/training/train.py"}
