"""Which way imports point. Data walks text -> tokens -> model -> decoder -> text, and so do these arrows."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Each package may import, of djax, only from these (and from itself).
ALLOWED = {
    "djax/errors.py": (),
    "djax/checks.py": ("errors",),
    "djax/pytree.py": ("errors", "checks"),
    "djax/files.py": ("errors",),
    "djax/private.py": ("errors",),
    "djax/process.py": ("errors",),
    "djax/programs.py": (),
    "djax/interrupt.py": (),
    "djax/cache_entries.py": ("files",),
    "djax/checkpoint_files.py": ("errors", "files"),
    "djax/consistency.py": ("errors", "checkpoint_files"),
    "djax/tokenizer_files.py": ("errors", "checkpoint_files", "consistency", "files"),
    "djax/compilation.py": ("errors", "cache_entries", "checks", "private"),
    "djax/prompts.py": ("errors", "checks"),
    "djax/bounded_jinja.py": (),
    "djax/chat_template.py": ("errors", "bounded_jinja"),
    "djax/text.py": ("errors", "chat_template", "checks", "prompts", "tokenizer_files"),
    "djax/native": ("errors", "files", "private", "sharding"),
    "djax/models": ("errors", "models", "native", "process", "sharding"),
    "djax/decoding": ("errors", "checks", "pytree", "native", "sharding", "decoding"),
    "djax/caching": ("checks", "pytree", "caching", "decoding.contract"),
    "djax/smoothing.py": ("checks", "pytree"),
    "djax/trace.py": (),
    "djax/options.py": ("caching.contract", "decoding", "smoothing"),
    "djax/stop.py": ("errors", "checks"),
    "djax/plugs.py": ("errors", "checks"),
    "convert": ("errors", "checkpoint_files", "convert", "directories", "files", "models.layers"),
    "djax/directories.py": ("errors", "checks"),
    "djax/source.py": (*("errors", "checkpoint_files", "consistency", "files", "text", "convert", "models", "sharding"),),
    "djax/sharding.py": ("errors", "checks", "process"),
    "djax/model.py": (
        *("errors", "checks", "compilation", "models.quantized", "native", "process", "programs", "prompts", "sharding"),
    ),
    "djax/program.py": (
        *("caching.contract", "decoding.contract", "decoding.not_before", "models.layers", "process", "smoothing", "trace"),
    ),
    "djax/checkpoint.py": (
        *("errors", "checks", "convert", "directories", "model", "models", "process", "sharding", "source"),
    ),
    "djax/conversion.py": ("errors", "files", "convert", "checkpoint", "directories", "process", "source"),
    "djax/request.py": (
        *("errors", "checks", "text", "plugs", "process", "pytree", "model", "program"),
        *("caching", "decoding", "options", "smoothing", "stop"),
    ),
    "djax/generate.py": (
        *(
            "errors",
            "text",
            "compilation",
            "pytree",
            "model",
            "native",
            "process",
            "program",
            "programs",
            "request",
            "sharding",
        ),
        *("options", "stop", "trace"),
    ),
    "djax/engine.py": (
        *("errors", "checks", "compilation", "generate", "model", "native", "options"),
        *("process", "program", "programs", "request"),
    ),
    "djax/explain.py": (
        *("errors", "checks", "decoding.contract", "generate", "model", "options"),
        *("process", "program", "request"),
    ),
    "djax/ahead.py": (
        *("errors", "checks", "compilation", "directories", "native", "generate", "model", "options"),
        *("process", "program", "request"),
    ),
    "djax/presets.py": ("errors", "checks", "configs", "options"),
    "djax/pictures": ("errors", "files", "pictures"),
    "djax/distill": (
        *(
            "errors",
            "checks",
            "compilation",
            "plugs",
            "pytree",
            "caching",
            "decoding",
            "smoothing",
            "model",
            "generate",
            "options",
        ),
        *("checkpoint", "files", "models.hf", "process", "sharding", "source", "training", "distill"),
    ),
    "djax/training": (
        *("errors", "compilation", "directories", "files", "text", "models", "model", "checkpoint", "generate", "process"),
        *("options", "sharding", "training"),
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
                    allows = any(target == module or target.startswith(f"{module}.") for module in allowed)
                    assert allows, f"{file.relative_to(ROOT)} imports {name}"


def test_flax_lives_in_models_and_where_trees_are_read():
    users = {f.relative_to(ROOT).as_posix() for f in (ROOT / "djax").rglob("*.py") if any("flax" in n for n in imported(f))}
    assert users == {
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
