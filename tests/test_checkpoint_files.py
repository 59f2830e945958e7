"""One door for every file of a checkpoint: no link leads out, nothing but a file is read, and a hub cache's links load."""

import base64
import contextlib
import os
import shutil
import threading

import pytest
from test_hostile_checkpoints import edited, limited

import djax
from djax.checkpoints.source import SHIPPED, opened
from djax.errors import CheckpointError, OptionError, PathError

OPTIONAL = {
    "generation_config.json": '{"eos_token_id": 0}',
    "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
    "added_tokens.json": "{}",
    "chat_template.json": "{}",
    "additional_chat_templates/other.jinja": "x",
}
FILES = [*sorted(file.name for file in SHIPPED.iterdir()), *OPTIONAL]


def copy_whole(directory):
    shutil.copytree(SHIPPED, directory)
    (directory / "additional_chat_templates").mkdir()
    for name, content in OPTIONAL.items():
        (directory / name).write_text(content)
    return directory


def load(directory):
    with limited(), opened(directory) as source:
        return source


@pytest.fixture
def whole(tmp_path):
    return copy_whole(tmp_path / "checkpoint")


def replace(file, how, tmp_path):
    content = file.read_bytes()
    file.unlink()
    outside = tmp_path / "secret" / file.name
    outside.parent.mkdir(exist_ok=True)
    outside.write_bytes(content)
    match how:
        case "absolute":
            file.symlink_to(outside)
        case "relative":
            file.symlink_to(os.path.relpath(outside, file.parent))
        case "chain":
            (file.parent / "step").symlink_to(outside)
            file.symlink_to("step")
        case "named blobs":
            (tmp_path / "blobs").mkdir()
            shutil.move(outside, tmp_path / "blobs" / "abc0")
            file.symlink_to(tmp_path / "blobs" / "abc0")
        case "broken":
            file.symlink_to("nowhere")
        case "loop":
            file.symlink_to(file.name)
        case "fifo":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "directory":
            file.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "how", ["absolute", "relative", "chain", "named blobs", "broken", "loop", "fifo", "device", "directory"]
)
def test_what_is_refused(whole, tmp_path, name, how):
    replace(whole / name, how, tmp_path)
    message = r"points outside the checkpoint's directory|a link that leads nowhere|it is no regular file"
    with pytest.raises(CheckpointError, match=message):
        load(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_link_within_the_directory(whole, name):
    (whole / name).rename(whole / "kept")
    (whole / name).symlink_to(os.path.relpath(whole / "kept", (whole / name).parent))
    assert load(whole).tokenizer.chat_template


def test_a_folder_of_templates_elsewhere(whole, tmp_path):
    (whole / "additional_chat_templates").rename(tmp_path / "elsewhere")
    (whole / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="points outside"):
        load(whole)


def test_files_linked_into_a_hub_cache(whole, tmp_path):
    """Downloads into a directory of their own used to be links to the cache's blobs."""
    blobs = tmp_path / "hub" / "models--someone--some-model" / "blobs"
    blobs.mkdir(parents=True)
    for n, name in enumerate(FILES):
        blob = blobs / f"{n:064x}"
        (whole / name).rename(blob)
        (whole / name).symlink_to(blob)
    assert load(whole).tokenizer is not None
    (blobs.parent / "secret").write_text("{}")
    (whole / "generation_config.json").unlink()
    (whole / "generation_config.json").symlink_to(blobs.parent / "secret")
    with pytest.raises(CheckpointError, match="points outside"):
        load(whole)


def test_a_snapshot_of_the_hub_s_cache(tmp_path):
    """Its files are links to its own repository's blobs; another's are refused."""
    hub = tmp_path / "hub"
    snapshot = copy_whole(hub / "models--a--b" / "snapshots" / "0123")
    for number, repository in enumerate(["models--a--b", "models--c--d"]):
        blobs = hub / repository / "blobs"
        blobs.mkdir(parents=True)
        blob = blobs / f"{number:040x}"
        shutil.copy(SHIPPED / "tokenizer.json", blob)
        (snapshot / "tokenizer.json").unlink()
        (snapshot / "tokenizer.json").symlink_to(f"../../../{repository}/blobs/{blob.name}")
        if number:
            with pytest.raises(CheckpointError, match="points outside"):
                load(snapshot)
        else:
            load(snapshot)
    (tmp_path / "name").symlink_to(snapshot)  # the directory itself may be a link
    (snapshot / "tokenizer.json").unlink()
    load(tmp_path / "name")


def test_settings_that_name_other_files(whole, tmp_path):
    """transformers would open some of these."""
    secret = tmp_path / "tokenizer.secret.json"
    os.mkfifo(secret)
    other = dict.fromkeys(["tokenizer_file", "vocab_file", "merges_file", "gguf_file", "special_tokens_map_file"], str(secret))
    for name in (str(secret), "../tokenizer.secret.json", "tokenizer.1.0.json/../../tokenizer.secret.json"):
        edited(whole, "tokenizer_config.json", fast_tokenizer_files=[name], init_inputs=[str(secret)], **other)
        tokenizer = load(whole).tokenizer
        assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"


def test_what_an_export_has(whole, tmp_path):
    """Nothing of where the tokenizer was read from."""
    model = djax.load(whole)
    assert model.tokenizer.name_or_path == str(whole)
    djax.export_hf(model, tmp_path / "out")
    again = djax.load(tmp_path / "out")
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert "djax-tokenizer" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("name", [n for n in FILES if not n.endswith(".safetensors")])
def test_a_byte_order_mark_is_no_content(whole, name):
    before = load(whole).tokenizer.chat_template
    (whole / name).write_bytes(b"\xef\xbb\xbf" + (whole / name).read_bytes())
    after = load(whole).tokenizer.chat_template
    assert after == before or name.startswith("additional"), "and there the other one is as it was, too"
    assert "\ufeff" not in str(after)


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith(".json")])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"{", b"1" * 5000])
def test_json_that_is_none(whole, name, content):
    (whole / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: expected (a )?(JSON|text)|{name} cannot be read"):
        load(whole)


def test_more_text_than_any_checkpoint_has(whole):
    with (whole / "tokenizer.json").open("r+b") as file:
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="expected at most 100000000 bytes, there are 200000000"):
        load(whole)


PANICKING = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff").decode()}


def test_a_tokenizer_that_panics(whole, capfd):
    """A panic is a BaseException, and is printed besides; here it is neither."""
    edited(whole, "tokenizer.json", normalizer=PANICKING)
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read: the tokenizers library panics"):
        load(whole)
    assert capfd.readouterr().err == ""
    os.write(2, b"standard error is where it was")
    assert capfd.readouterr().err == "standard error is where it was"


def test_an_interruption_is_no_panic(whole, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(whole)


def test_standard_error_among_threads(whole, tmp_path, capfd):
    """Many tokenizers at once, half of them panicking: standard error is the process's own again."""
    bad = tmp_path / "bad"
    shutil.copytree(whole, bad)
    edited(bad, "tokenizer.json", normalizer=PANICKING)

    def work(directory):
        for _ in range(5):
            with contextlib.suppress(CheckpointError), opened(directory):
                pass

    threads = [threading.Thread(target=work, args=(d,)) for d in (whole, bad) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"here")
    assert capfd.readouterr().err == "here"


@pytest.mark.parametrize(
    "path", ["a" * 300, "a\0b", "~nobody-of-this-name/x", "/dev/null/x", 3, b"\xff" * 300, "\ud800", object()]
)
def test_paths_that_none_can_be(path):
    with pytest.raises((PathError, OptionError)):
        djax.load(path)


def test_orbax_files_go_through_it(tmp_path):
    djax.save(djax.load(), tmp_path / "sound")
    files = [file.relative_to(tmp_path / "sound") for file in sorted((tmp_path / "sound").rglob("*")) if file.is_file()]
    for name in files:
        for how in ("absolute", "fifo", "broken"):
            directory = tmp_path / "case"
            shutil.copytree(tmp_path / "sound", directory)
            replace(directory / name, how, tmp_path)
            with pytest.raises(CheckpointError, match=r"points outside|a link that leads nowhere|no regular file"):
                load(directory)
            shutil.rmtree(directory)
    params = tmp_path / "sound" / "params"
    params.rename(tmp_path / "params")
    params.symlink_to(tmp_path / "params")
    with pytest.raises(CheckpointError, match="points outside"):
        load(tmp_path / "sound")


def test_new_directories_that_none_can_be(small, tmp_path):
    for path in ("a" * 300, "a\0b", "/dev/null/x", "/proc/x", tmp_path / ("a" * 250), 3):
        with pytest.raises(OptionError, match=r"cannot be made|directory: .* cannot be used|is no path|expected a path"):
            djax.save(small, path)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OptionError, match="already exists"):
        djax.save(small, tmp_path / "link")
