"""What a training keeps in its directory besides checkpoints: which run it is of, and its log."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from djax.checks import describe
from djax.errors import CheckpointError, DjaxError, OptionError, TrainingError
from djax.storage.files import parse_json, read_text, write


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """What files and Orbax raise while the disk is full, or a directory is gone, as `TrainingError`."""
    try:
        yield
    except Exception as error:  # Orbax and tensorstore raise many kinds
        if isinstance(error, DjaxError) and not isinstance(error, CheckpointError):
            raise
        raise TrainingError(
            f"{directory}: cannot be written: {error}; what was saved before is there, start again to go on"
        ) from error


def has_checkpoints(directory: Path) -> bool:
    """Whether something has been trained in this run's directory."""
    there = directory / "checkpoints"
    return there.is_dir() and any(step.name.isdecimal() for step in there.iterdir())


@contextmanager
def open_checkpoints(directory: Path, policy: object) -> Iterator[Any]:
    """Orbax's checkpointer of a run, which keeps what the policy says. What a killed process was writing is removed."""
    from orbax.checkpoint.experimental.v1 import training as orbax

    place = (directory / "checkpoints").resolve()
    with writing(directory):
        saved = orbax.Checkpointer(place, preservation_policy=policy, cleanup_tmp_directories=True)
    try:
        yield saved
    except BaseException:
        # The original error is raised, not the one from closing.
        with suppress(Exception):
            saved.close()
        raise
    with writing(directory):
        saved.close()


def load_state(saved: Any, step: int, like: Any, directory: Path) -> Any:
    """The checkpoint of a step, as arrays that lie where those of `like`, a dict, do.

    Raises `OptionError` for one that is damaged, or that holds something else.
    """
    try:
        return saved.load(step, like)
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise OptionError(
            f"{directory / 'checkpoints' / str(step)}: cannot be read as this run's checkpoint "
            f"({describe(error):.200}); if another version of djax wrote it, go on with that one, "
            "otherwise choose another directory"
        ) from error


def begin(directory: Path, described: Mapping[str, Any]) -> None:
    """Make the directory, or check that its run.json describes this run (JSON values).

    A run.json that is cut short or empty, as a full disk or a killed process of an older djax left it, is written again as long
    as nothing has been trained. Raises `OptionError` for another run's directory, and for such a file next to checkpoints;
    `TrainingError` if it cannot be written.
    """
    described = json.loads(json.dumps(described))
    file = directory / "run.json"
    for left in directory.glob(".*.partial"):
        if left.is_file():  # a process that was killed while it wrote; another directory's parts have locks
            left.unlink()
    try:
        there = parse_json(read_text(file))
        if not isinstance(there, dict):
            raise ValueError(f"expected an object, got {there!r:.60}")
    except FileNotFoundError:
        there = None
    except ValueError as error:
        if has_checkpoints(directory):
            raise OptionError(
                f"{file}: is damaged ({error}), so nothing says whose checkpoints these are; if they are of this very run, "
                "remove the file and start again to go on, otherwise choose another directory"
            ) from error
        there = None
    except OSError as error:
        raise OptionError(f"{file}: cannot be read: {error}; choose another directory") from error
    if there is None:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            write(file, json.dumps(described, indent=1) + "\n")
        return
    wrong = [name for name in {**described, **there} if described.get(name) != there.get(name)]
    if wrong:
        raise OptionError(f"{directory}: holds a run with other settings ({', '.join(wrong)} differ); choose another directory")


def append(file: Path, entry: Mapping[str, Any]) -> None:
    """Log an entry, which has its "step"."""
    with writing(file.parent), file.open("a", encoding="utf-8") as out:
        print(json.dumps(entry), file=out, flush=True)


def forget_after(file: Path, step: int) -> None:
    """Take back what a killed run logged of updates that are done anew, and half a line, where it was killed."""
    if file.exists():
        with writing(file.parent):
            before = file.read_bytes()
            lines = before.split(b"\n")
            after = b"".join(line + b"\n" for line in lines if _is_until(line, step))
            if after != before:
                write(file, after)


def _is_until(line: bytes, step: int) -> bool:
    try:
        entry = parse_json(line.decode())
        return isinstance(entry, dict) and entry["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
