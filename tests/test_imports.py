"""Which way imports point. Data walks text -> tokens -> model -> decoder -> text, and so do these arrows."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Each room (a folder, or a file at the top of djax), below those that import from it: what it may import of djax, at the top
# of a file or inside a function. "djax" is what the package itself exports.
ROOMS = {
    "errors": "",
    "version": "",
    "checks": "errors",
    "plugs": "checks errors",
    "pytree": "checks errors",
    "storage": "checks errors",
    "convert": "errors storage",
    "pictures": "errors storage",
    "runtime": "checks errors storage",
    "text": "checks errors storage",
    "kernels": "errors runtime storage",
    "decoding": "checks errors kernels pytree",
    "models": "checks convert errors kernels runtime text",
    "caching": "checks decoding pytree",
    "checkpoints": "checks convert errors models runtime storage text version",
    "engine": "caching checks decoding errors kernels models plugs pytree runtime storage text",
    "plug_files": "caching checks decoding errors plugs",
    "tasks": "engine errors models runtime",
    "training": "checkpoints checks errors kernels models runtime storage tasks text",
    "distill": ("caching checkpoints checks decoding engine errors kernels models plugs pytree runtime storage tasks training"),
    "configs": "caching decoding distill training",
    "presets": "caching checks configs decoding engine errors pytree",
    "djax": ("caching checkpoints decoding engine errors models presets pytree runtime version"),
    "benchmarks": (
        "caching checkpoints configs convert decoding distill djax engine errors kernels "
        "models plugs pytree runtime storage tasks text"
    ),
    "cli": (
        "benchmarks checkpoints checks configs distill djax engine errors pictures plug_files "
        "plugs presets runtime storage tasks training"
    ),
}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "djax")


def name_module(file):
    """The dotted name of a file of the project."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "djax" else ("djax", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_imports(file, modules):
    """The modules of djax that a file imports from, wherever in it, by name, through a package or relatively."""
    name = name_module(file)
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for one in found:
            while one.startswith("djax.") and one not in modules:
                one = one.rpartition(".")[0]
            if one.split(".")[0] == "djax":
                yield one


def find_room(module):
    return module.split(".")[1] if "." in module else "djax"


def test_the_arrows():
    """They are exactly these, and none points up."""
    files = {name_module(f): f for top in ("djax", "convert", "configs", "benchmarks") for f in (ROOT / top).rglob("*.py")}
    found = {find_room(module): set() for module in files}
    for module, file in files.items():
        found[find_room(module)] |= {find_room(one) for one in find_imports(file, files)} - {find_room(module)}
    assert {room: " ".join(sorted(rooms)) for room, rooms in found.items()} == ROOMS
    below = set()
    for room, rooms in ROOMS.items():
        assert set(rooms.split()) <= below, room
        below.add(room)


# What only djax/kernels may name: how a program asks for its platform, and what it calls there.
OF_KERNELS = set("ffi pallas triton native platform_dependent default_backend why_not DJAX_KERNELS".split())
PLATFORMS = set("cpu gpu cuda rocm tpu".split())
# What says for which platform a program is made, or that a command computes on none but a CPU.
NAMES_PLATFORMS = {"djax/engine/ahead.py": PLATFORMS | {"default_backend"}, "djax/cli": {"cpu"}}


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
        "djax/checkpoints/source.py",
        "djax/checkpoints/checkpoint.py",
        "djax/engine/ahead.py",
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
    assert found == {"djax/kernels/choice.py", "djax/models/model.py", "djax/engine/request.py", "djax/training/train.py"}
