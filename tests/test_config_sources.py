"""Settings: who wins, what is refused, and that the message says what to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from gpuguard import config_sources
from gpuguard.cli import main
from gpuguard.config import Config
from gpuguard.config_sources import ConfigError, config_dirs, config_files, load_config
from gpuguard.policies import PolicyError, load_policy, policy_files


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(*files: Path, environ: dict[str, str] | None = None, flags: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(flags=flags, environ=environ or {}, files=files)
    return str(caught.value)


def test_nothing_given_is_all_defaults():
    loaded = load_config(environ={}, files=[])
    assert loaded.config == Config()
    assert set(loaded.origins.values()) == {"default"}


def test_each_source_outweighs_those_before_it(tmp_path):
    main_file = write(tmp_path, "gpuguard.toml",
                      "[guard]\ntick_ms = 100\n[nvml]\nrate_hz = 2\n[packets]\nsnap_bytes = 96")
    drop_in = write(tmp_path, "conf.d/10.toml", "[guard]\ntick_ms = 200\n[nvml]\nrate_hz = 3.0")
    loaded = load_config(
        flags={"guard.tick_ms": "400"},
        environ={"GPUGUARD_GUARD_TICK_MS": "300", "GPUGUARD_SOCKETS_ENABLED": "false", "HOME": "/"},
        files=[main_file, drop_in],
    )
    assert loaded.config.guard.tick_ms == 400
    assert loaded.origins["guard.tick_ms"] == "flag"
    assert loaded.config.sockets.enabled is False
    assert loaded.origins["sockets.enabled"] == "GPUGUARD_SOCKETS_ENABLED"
    assert loaded.config.nvml.rate_hz == 3.0
    assert loaded.origins["nvml.rate_hz"] == str(drop_in)
    assert loaded.config.packets.snap_bytes == 96
    assert loaded.origins["packets.snap_bytes"] == str(main_file)
    assert loaded.origins["guard.mode"] == "default"


def all_of(home: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(home), "HOME": "/"}
    load_config(environ=environ, files=config_files(environ, root=False))
    load_policy(policy_files(environ, root=False), environ)


@pytest.mark.parametrize(("name", "wrong"), [
    ("gpuguard/gpuguard.toml/x", "gpuguard.toml: Is a directory"), ("gpuguard/conf.d", "conf.d: Not a directory"),
    ("gpuguard", "gpuguard: Not a directory"), ("gpuguard/policies.d", "policies.d: Not a directory")])
def test_what_is_no_file_or_no_folder_is_not_passed_over(tmp_path, name, wrong):
    """A container's runtime makes a folder of a file that is to be mounted and is not there."""
    write(tmp_path, name, "")
    with pytest.raises((ConfigError, PolicyError), match=f"{wrong}$"):
        all_of(tmp_path)


def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path):
    write(tmp_path, "gpuguard/conf.d/10.toml", "")
    (tmp_path / "gpuguard" / "gpuguard.toml").symlink_to("absent.toml")
    with pytest.raises(ConfigError, match=r"gpuguard\.toml: No such file or directory"):
        all_of(tmp_path)


def test_files_are_found_weakest_first(tmp_path):
    write(tmp_path, "gpuguard/conf.d/20.toml", "")
    write(tmp_path, "gpuguard/conf.d/10.toml", "")
    write(tmp_path, "gpuguard/conf.d/readme.txt", "")
    write(tmp_path, "gpuguard/config.toml", "")
    found = config_files({"XDG_CONFIG_HOME": str(tmp_path)}, root=False)
    mine = [path.name for path in found if tmp_path in path.parents]
    assert mine == ["config.toml", "10.toml", "20.toml"]


def test_root_reads_the_hosts_settings_only(tmp_path):
    assert config_dirs({"XDG_CONFIG_HOME": str(tmp_path)}, root=True) == [Path("/etc/gpuguard")]
    relative = config_dirs({"XDG_CONFIG_HOME": "not/absolute", "HOME": "/home/one"}, root=False)
    assert relative[-1] == Path("/home/one/.config/gpuguard")


def test_one_named_file_is_the_only_one(tmp_path):
    path = write(tmp_path, "own.toml", "[guard]\nmode = 'enforce'")
    loaded = load_config(environ={"GPUGUARD_CONFIG": str(path)})
    assert loaded.config.guard.mode == "enforce"
    assert config_files({"GPUGUARD_CONFIG": str(path)}) == [path]


@pytest.mark.parametrize(("text", "words"), [
    ("[guard]\ntickms = 5", ["guard.tickms", "did you mean guard.tick_ms?"]),
    ("[gaurd]\ntick_ms = 5", ["[gaurd]", "did you mean guard?"]),
    ("tick_ms = 5", ["no such section [tick_ms]"]),
    ("guard = 5", ["guard is a section"]),
    ("[guard]\ntick_ms = '250 ms'", ["guard.tick_ms", "'250 ms'", "milliseconds", "without its unit"]),
    ("[guard]\ntick_ms = 0.5", ["guard.tick_ms", "milliseconds"]),
    ("[guard]\ntick_ms = 1", ["guard.tick_ms", ">= 10"]),
    ("[guard]\nmode = 'kill'", ["guard.mode", "'kill'"]),
    ("[guard]\nalarms_per_gpu_year = 0", ["guard.alarms_per_gpu_year"]),
    ("[guard]\nalarms_per_gpu_year = nan", ["guard.alarms_per_gpu_year"]),
    ("[packets]\ninterfaces = 'eth0'", ["packets.interfaces", "array"]),
    ("[packets]\ninterfaces = ['lo', 'eth0', 'lo']", ["packets.interfaces", "names lo twice"]),
    ("[packets]\nenabled = 1", ["packets.enabled", "bool"]),
    ("[packets]\nignore = ['port 1', 'net 10.8.0.1/16']", ["packets.ignore", "'net 10.8.0.1/16'", "host bits set"]),
    (f"[packets]\nignore = {['port 1'] * 33}", ["packets.ignore", "<= 32"]),
    ("[nvml]\nrate_hz = 1000", ["nvml.rate_hz", "hertz"]),
    ("[guard\nmode = 1", ["not TOML", "line 1"]),
    ("a = " + "[" * 100_000, ["not TOML"]),
])
def test_a_wrong_file_is_named_with_its_key(tmp_path, text, words):
    path = write(tmp_path, "gpuguard.toml", text)
    said = refusal(path)
    assert str(path) in said
    for word in words:
        assert word in said


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.toml")
    assert "Is a directory" in refusal(tmp_path)
    bad = tmp_path / "bytes.toml"
    bad.write_bytes(b"[guard]\n\xff\xfe")
    assert "not UTF-8 (byte 8)" in refusal(bad)
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (config_sources.FILE_BYTES_MAX + 1))
    assert "larger than" in refusal(large)


def test_wrong_variables_and_flags_are_named():
    said = refusal(environ={"GPUGUARD_GUARD_TICKMS": "1"})
    assert "GPUGUARD_GUARD_TICKMS" in said
    assert "did you mean GPUGUARD_GUARD_TICK_MS?" in said
    assert "did you mean GPUGUARD_GUARD_MODE?" in refusal(environ={"GPUGUARD_GAURD_MODE": "enforce"})
    assert "GPUGUARD_NVML_RATE_HZ" in refusal(environ={"GPUGUARD_NVML_RATE_HZ": "fast"})
    assert "did you mean guard.mode?" in refusal(flags={"guard.mod": "enforce"})


def test_lists_in_variables_are_split_at_commas():
    loaded = load_config(environ={"GPUGUARD_PACKETS_INTERFACES": "eth0, eth1,"}, files=[])
    assert loaded.config.packets.interfaces == ("eth0", "eth1")


def test_variables_that_are_no_settings_pass():
    names = ("STATE_DIR", "RUNTIME_DIR", "LOG_DIR", "DATA_DIR", "SANDBOX_ID", "STANDINS", "FUZZ_SECONDS")
    loaded = load_config(environ={f"GPUGUARD_{name}": "x" for name in names}, files=[])
    assert loaded.config == Config()


@given(st.binary(max_size=200))
def test_any_bytes_are_settings_or_a_config_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    try:
        loaded = load_config(environ={}, files=[path])
    except ConfigError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(loaded.config, Config)


def test_every_key_is_described_and_default_is_valid():
    defaults = Config()
    for key, kind in config_sources.all_keys().items():
        meta = [one for one in kind.__metadata__ if isinstance(one, msgspec.Meta)]
        assert meta, key
        assert meta[0].description, key
        value = config_sources.value_of(defaults, key)
        assert msgspec.convert(value, kind) == value


def test_schema_refuses_unknown_keys():
    schema = config_sources.json_schema()
    assert schema["$defs"]["GuardSettings"]["additionalProperties"] is False
    assert schema["$defs"]["Config"]["additionalProperties"] is False


def run(*args: str, environ: dict[str, str] | None = None):
    return CliRunner().invoke(main, ["config", *args], env=environ)


def test_show_prints_toml_that_reads_back_to_the_same_settings(tmp_path):
    given_file = write(tmp_path, "g.toml", "[packets]\ninterfaces = ['eth0', 'a\"b']\n[guard]\ntick_ms = 100")
    environ = {"GPUGUARD_CONFIG": str(given_file)}
    shown = run("show", environ=environ)
    assert shown.exit_code == 0
    again = load_config(environ={}, files=[write(tmp_path, "again.toml", shown.stdout)])
    assert again.config == load_config(environ=environ).config


def test_show_origin_and_json(tmp_path):
    environ = {"GPUGUARD_CONFIG": str(write(tmp_path, "g.toml", "[guard]\ntick_ms = 100"))}
    assert f"tick_ms = 100  # {tmp_path}/g.toml" in run("show", "--origin", environ=environ).stdout
    content = json.loads(run("show", "--origin", "-o", "json", environ=environ).stdout)
    assert content["guard.tick_ms"] == {"value": 100, "origin": f"{tmp_path}/g.toml"}
    assert content["guard.mode"] == {"value": "observe", "origin": "default"}


def test_validate_says_good_or_why_not(tmp_path):
    good = run("validate", str(write(tmp_path, "good.toml", "[guard]\ntick_ms = 100")))
    assert good.exit_code == 0
    assert "good" in good.stdout
    bad = run("validate", str(write(tmp_path, "bad.toml", "[guard]\ntikc_ms = 100")))
    assert bad.exit_code == 2
    assert "did you mean guard.tick_ms?" in bad.stderr


def test_schema_is_json():
    shown = json.loads(run("schema").stdout)
    assert shown["$ref"] == "#/$defs/Config"
    assert shown["$defs"].keys() == config_sources.json_schema()["$defs"].keys()


@pytest.mark.parametrize(("text", "said"), [
    ("[guard]\nmode = 'enfore'\n", "guard.mode = 'enfore': it is one of observe, enforce"),
    ("[metrics]\nlisten = '0.0.0.0:9400'\n", "metrics.listen = '0.0.0.0:9400': it is a loopback address"),
    ("[toolcalls]\notlp_listen = ':4317'\n", "of this host alone"),
    ("[recording]\ndirectory = '../x'\n", "a name in the guard's state folder"),
])
def test_a_refusal_says_what_would_do(tmp_path, text, said):
    path = tmp_path / "gpuguard.toml"
    path.write_text(text)
    assert said in refusal(path)


@pytest.mark.parametrize(("section", "key", "value"), [
    ("metrics", "listen", ""), ("metrics", "listen", "127.0.0.53:9400"), ("metrics", "listen", "[::1]:9400"),
    ("toolcalls", "otlp_listen", ""), ("toolcalls", "otlp_listen", "unix:/run/x.sock"),
    ("toolcalls", "otlp_listen", "localhost:4317"), ("toolcalls", "otlp_listen", "[::1]:4317"),
])
def test_places_of_this_host_alone_are_taken(tmp_path, section, key, value):
    path = tmp_path / "gpuguard.toml"
    path.write_text(f"[{section}]\n{key} = '{value}'\n")
    assert getattr(getattr(load_config(files=[path]).config, section), key) == value
