"""Settings: sources and their order, validation, and documentation."""

from __future__ import annotations

import os
import re
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sollold.settings import load as settings_load
from sollold.settings import read_file
from sollold.settings.catalogue import catalogue
from sollold.settings.document import documentation, example, in_force
from sollold.settings.fault import SettingsError
from sollold.settings.live import LIVE_KEYS
from sollold.settings.load import differences, load, merged
from sollold.settings.location import cache_home, candidates, expanded, local_address
from sollold.settings.paths import Places, places
from sollold.settings.schema import GIB, MIB, ModelProfile, Settings


def write(folder: Path, text: str) -> Path:
    file = folder / "sollold.toml"
    file.write_text(text)
    return file


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, ""), {}).settings == Settings()


def test_flags_override_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, '[http]\nport = 1000\nhost = "::"\n[node]\nmemory_limit = "2 GiB"\n')
    environment = {"SOLLOLD_HTTP_PORT": "2000", "SOLLOLD_NODE_NAME": "pc"}
    loaded = load(file, environment, [("http.port", "3000", "--port")])
    assert (loaded.settings.http.port, loaded.settings.http.host) == (3000, "::")
    assert loaded.settings.node.memory_limit == 2 * GIB
    assert loaded.origins == {
        "http.port": "--port",
        "http.host": f"{file}:3",
        "node.memory_limit": f"{file}:5",
        "node.name": "SOLLOLD_NODE_NAME",
    }


def test_the_environment_can_set_lists_tables_and_units(tmp_path: Path) -> None:
    environment = {
        "SOLLOLD_CLUSTER_SEEDS": "a:1, b:2",
        "SOLLOLD_NODE_DEVICE_LIMITS": "CUDA0=20 GiB,CPU=400 MiB",
        "SOLLOLD_PLACEMENT_KEEP_ALIVE": "1h30m",
        "SOLLOLD_CLUSTER_MDNS": "off",
    }
    settings = load(write(tmp_path, ""), environment).settings
    assert settings.cluster.seeds == ("a:1", "b:2")
    assert settings.node.device_limits == {"CUDA0": 20 * GIB, "CPU": 400 * MIB}
    assert settings.placement.keep_alive == 5400
    assert settings.cluster.mdns is False


def test_external_workers_can_be_set_by_rpc_backends(tmp_path: Path) -> None:
    file = write(tmp_path, '[llama]\nrpc_backends = ["x:1"]\n')
    loaded = load(file, {"RPC_BACKENDS": "10.0.0.5:50052, pc:50053"})
    assert loaded.settings.llama.rpc_backends == ("10.0.0.5:50052", "pc:50053")
    assert loaded.origins["llama.rpc_backends"] == "RPC_BACKENDS"
    own = load(file, {"RPC_BACKENDS": "a:1", "SOLLOLD_LLAMA_RPC_BACKENDS": "b:2"})
    assert own.settings.llama.rpc_backends == ("b:2",), "sollold's own variable takes precedence"
    assert not own.settings.llama.allow_plain_workers


def test_model_profiles_are_tables_and_are_shown_as_valid_toml(tmp_path: Path) -> None:
    text = '[models.profiles."big:1t"]\nparameters = 1000\nmemory = "600 GiB"\nrequires_distributed = true\n'
    loaded = load(write(tmp_path, text), {})
    profile = loaded.settings.models.profiles["big:1t"]
    assert profile == ModelProfile(1000.0, 600 * GIB, True)
    shown = next(value for key, value, _ in in_force(loaded) if key == "models.profiles")
    assert load(write(tmp_path, f"[models]\nprofiles = {shown}\n"), {}).settings == loaded.settings


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[http]\nprt = 5", 2, "did you mean port?"),
        ("\n\n[htp]\nport = 5", 3, "did you mean http?"),
        ("[http]\nport = 70000", 2, "must be at most 65535"),
        ('[http]\nport = "many"', 2, 'http.port: must be a whole number, not "many"'),
        ('[http]\nport = "8080"', 2, 'not "8080"; write 8080'),
        ("[http]\nport = true", 2, "must be a whole number, not true"),
        ('[cluster]\nmdns = "yes"', 2, 'must be true or false, not "yes"'),
        ('[cluster]\nseeds = "a:1"', 2, 'must be a list, not "a:1"; write ["a:1"]'),
        ('[cluster]\nseeds = ["a:1", 5]', 2, "each of its values must be a quoted string, not 5"),
        ("[models]\naliases = { a = 1 }", 2, "each of its values must be a quoted string"),
        ("[models]\nfolders = {}", 2, "must be a list, not a table"),
        ("[cluster]\ntoken = 123", 2, "must be a quoted string"),
        ("port = 5", 1, "port is in no section: write it below [http] or [cluster]"),
        ('[placement]\n\npolicy = "fast"', 3, "did you mean fastest?"),
        ('[node]\nmemory_limit = "4 pounds"', 2, "20 GiB"),
        ('[node]\ndevice_limits = { CUDA0 = "x" }', 2, "not a size"),
        ("[node]\nmemory_limit = -1", 2, "must be at least 0"),
        ('[models.profiles."big:1t"]\nmemry = 1', 1, "did you mean memory?"),
        ('[models]\nprofiles = { big = "x" }', 2, "'big' is a table with the keys parameters, memory"),
        ("[http]\nseeds = []", 2, "did you mean cluster.seeds?"),
        ("http = 3", 1, "is a section"),
        ('[cluster]\ntoken = "abc"', 2, "64 hex digits, as `sollold token` makes them"),
        ('[cluster]\nold_tokens = ["xy"]', 2, "64 hex digits"),
        ('[cluster]\nseeds = ["a:b:c d"]', 2, "host, host:port or [IPv6]:port"),
        ("[serving]\ndrain_limit = -1", 2, "must be at least 0"),
        ("[serving]\ndrain_limit = inf", 2, "must be at most 100000000"),
        ("[serving]\nstall = nan", 2, "nan is not a usable number"),
        ("[placement]\nkeep_alive = inf", 2, "inf is not a usable number"),
        (f'[node]\nmemory_limit = "{"9" * 400}"', 2, "is too large"),
        (f"[node]\nmemory_limit = {2**63}", 2, "must be at most "),
    ],
)
def test_an_invalid_key_or_value_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(SettingsError) as refused:
        load(file, {})
    assert str(refused.value).startswith(f"{file}:{line}: ")
    assert words in str(refused.value)
    assert not {"abc", "123"} & set(re.findall(r"\w+", str(refused.value))), "secrets are not shown"


@pytest.mark.parametrize("text", ["[http", f"x = {'[' * 5000}{']' * 5000}", "x = " + "1" * 5000])
def test_invalid_toml_is_refused(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(SettingsError, match="not TOML"):
        load(file, {})
    assert local_address({"SOLLOLD_CONFIG": str(file)}) is None


def test_a_file_with_a_bom_and_crlf_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sollold.toml"
    file.write_bytes(b"\xef\xbb\xbf[http]\r\nport = 1234\r\n")
    assert load(file, {}).settings.http.port == 1234
    assert local_address({"SOLLOLD_CONFIG": str(file)}) == ("127.0.0.1", 1234)
    file.write_bytes('[node]\nname = "Böse"'.encode("utf-16"))
    with pytest.raises(SettingsError, match="it is not in UTF-8"):
        load(file, {})


def test_settings_work_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a container's user that is given by its number."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 77)
    with pytest.raises(RuntimeError):
        Path.home()
    assert load(None, {"SOLLOLD_CONFIG": os.devnull}).file == Path(os.devnull)
    assert candidates()
    assert places(Settings().node).state == Path("/.local/state/sollold")
    assert expanded("~/models") == Path("~/models")
    assert expanded("~nobody-of-this-name/models") == Path("~nobody-of-this-name/models")


def test_an_unreadable_file_is_reported_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(settings_load, "read_file", refuse)
    with pytest.raises(SettingsError, match=r"can't be read: Permission denied; .* try with sudo"):
        load(tmp_path / "sollold.toml", {})


def test_only_unknown_sollold_variables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean SOLLOLD_HTTP_PORT"):
        load(write(tmp_path, ""), {"SOLLOLD_HTTP_PRT": "1"})
    with pytest.raises(SettingsError, match="did you mean SOLLOLD_HTTP_PORT"):
        load(write(tmp_path, ""), {"SOLLOLD_HTPP_PORT": "1"})
    load(write(tmp_path, ""), {"SOLLOLD_CONFIG": "x", "SOLLOLD_NODE_URL": "y", "HTTP_PRT": "1"})


def test_sollold_config_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "[http]\nport = 1\n")
    loaded = load(None, {"SOLLOLD_CONFIG": str(file)})
    assert (loaded.settings.http.port, loaded.file) == (1, file)
    with pytest.raises(SettingsError, match="can't be read"):
        load(None, {"SOLLOLD_CONFIG": str(tmp_path / "nowhere")})


@pytest.mark.parametrize("seed", ["pc", "pc:11436", "10.0.0.1:5", "[fe80::1%eth0]:11436", "fd00::7", "[::1]"])
def test_valid_seeds_are_accepted(tmp_path: Path, seed: str) -> None:
    assert load(None, {"SOLLOLD_CONFIG": "/dev/null", "SOLLOLD_CLUSTER_SEEDS": seed}).settings.cluster.seeds


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("http.hosts", "https://llm.example.com", "without http:// and port"),
        ("http.hosts", "llm.example.com:443", "without http:// and port"),
        ("http.hosts", "*llm.example.com", "without http:// and port"),
        ("http.cors_origins", "chat.example.com", "an origin such as https://"),
        ("http.cors_origins", "https://*.example.com", "an origin such as https://"),
        ("http.cors_origins", "https://chat.example.com/path", "an origin such as https://"),
        ("http.trusted_proxies", "999.1.1.1", "'999.1.1.1' is not an IP address or a network"),
        ("http.trusted_proxies", "10.0.0.0/33", "'10.0.0.0/33' is not an IP address or a network"),
        ("cluster.door", "1.2.3h", "a time such as 1h"),
        ("http.auth", "key", "'key' is not one of \"\", open, keys; did you mean keys?"),
        ("cluster.door", "9" * 400, "a time such as 1h"),
    ],
)
def test_values_that_can_never_match_are_refused(key: str, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)):
        load(None, {}, [(key, text, f"--set {key}={text}")])


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("cluster.seeds", '["a:1", "b"]'),
        ("cluster.seeds", "[::1]:5"),
        ("models.aliases", '{ gpt-4o = "llama3.1:70b" }'),
        ("models.profiles", "{ big = { parameters = 5 } }"),
        ("http.hosts", "LLM.example.com,*.example.com,büro.example,*,fd00::1,pc."),
        ("http.cors_origins", "https://chat.example.com:3000/,app://*,null,*,http://[::1]:3000"),
        ("http.trusted_proxies", "10.0.0.1/8,fd00::/8,127.0.0.1"),
        ("cluster.door", "1h30m"),
        ("cluster.door", "0"),
    ],
)
def test_common_notations_are_accepted(key: str, text: str) -> None:
    found = load(None, {}, [(key, text, "--set")]).settings
    assert '["' not in str(found) and "{ " not in str(found), "TOML lists and tables are parsed"


def test_every_setting_is_documented_and_the_example_has_the_defaults(tmp_path: Path) -> None:
    texts = documentation()
    assert [key for key in catalogue() if key not in texts] == []
    assert all(texts[name] for name in Settings.__slots__)
    assert set(catalogue()) >= LIVE_KEYS
    assert "# (restart)\n#port = 11435\n" in example() and "# (restart)\n#level" not in example()
    uncommented = re.sub(r"(?m)^#(\w+ = )", r"\1", example())
    assert sum(len(table) for table in tomllib.loads(uncommented).values()) == len(catalogue())
    assert load(write(tmp_path, uncommented), {}).settings == Settings()


def test_a_world_readable_secret_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, f'[cluster]\ntoken = "{"ab" * 32}"\n')
    tmp_path.chmod(0o755)
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="every user of this machine can read it") as refused:
        load(file, {})
    assert f"chmod o-rwx {file}" in str(refused.value) and "abab" not in str(refused.value)
    # Accepted for commands that only query a daemon, and if the folder or the file is closed to others.
    assert load(file, {}, skip_unreadable=True).settings.cluster.token == "ab" * 32
    tmp_path.chmod(0o750)
    assert load(file, {}).settings.cluster.token == "ab" * 32
    tmp_path.chmod(0o755)
    file.chmod(0o640)
    assert load(file, {}).settings.cluster.token == "ab" * 32


@pytest.mark.parametrize("text", ["[http]\nport = 1\n", '[cluster]\ntoken = "open"\n'])
def test_settings_without_a_secret_may_be_world_readable(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    tmp_path.chmod(0o755)
    file.chmod(0o644)
    load(file, {})


def test_the_token_is_not_shown(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, f'[cluster]\ntoken = "{"ab" * 32}"\n'), {})
    rows = {key: (value, origin) for key, value, origin in in_force(loaded)}
    assert rows["cluster.token"][0] == "(set)"
    assert rows["http.port"] == ("11435", "default")
    flag = ("cluster.token", "ab" * 32, "--set cluster.token=" + "ab" * 32)
    rows = {key: (value, origin) for key, value, origin in in_force(load(None, {}, [flag]))}
    assert rows["cluster.token"] == ("(set)", "--set cluster.token=…")
    with pytest.raises(SettingsError, match=r"--set cluster\.token=…: ") as refused:
        load(None, {}, [("cluster.token", "secret", "--set cluster.token=secret")])
    assert "secret" not in str(refused.value)


def test_secrets_within_a_setting_are_not_shown(tmp_path: Path) -> None:
    text = """
[llama]
extra_args = ["--api-key", "S1", "--hf-token=S2", "-hft", "S3", "--api-key-file", "/k", "--min-tokens", "9"]
[ollama]
url = "http://ann:S4@127.0.0.1:11434"
[log]
traces = "https://collector:4318/in?token=S5&board=7"
"""
    rows = {key: (value, origin) for key, value, origin in in_force(load(write(tmp_path, text), {}))}
    assert rows["ollama.url"][0] == '"http://…@127.0.0.1:11434"'
    assert rows["log.traces"][0] == '"https://collector:4318/in?token=…&board=7"'
    assert rows["llama.extra_args"][0] == (
        '["--api-key", "…", "--hf-token=…", "-hft", "…", "--api-key-file", "/k", "--min-tokens", "9"]'
    )
    flag = ("log.traces", "http://S6@anna:4318", "--set log.traces=http://S6@anna:4318")
    rows = {key: (value, origin) for key, value, origin in in_force(load(None, {}, [flag]))}
    assert rows["log.traces"] == ('"http://…@anna:4318"', "--set log.traces=…")
    assert rows["http.port"] == ("11435", "default")


def test_differences_are_listed(tmp_path: Path) -> None:
    new = load(write(tmp_path, '[log]\nlevel = "debug"\n[http]\nport = 1\n'), {}).settings
    assert differences(Settings(), new) == ["http.port", "log.level"]


def test_a_folder_that_cannot_be_searched_is_reported_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write(tmp_path, "[http]\nport = 1000\n")
    monkeypatch.setattr("sollold.settings.load.candidates", lambda: [tmp_path / ("x" * 300), own])
    assert load(environment={}, skip_unreadable=True).settings.http.port == 1000
    with pytest.raises(SettingsError, match=r"can't be read: .*too long"):
        load(environment={})


@pytest.mark.parametrize("closed", ["file", "folder"])
def test_an_unreadable_file_is_skipped_by_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    secret, own = tmp_path / "etc" / "sollold.toml", write(tmp_path, "[http]\nport = 1000\n")
    secret.parent.mkdir()
    secret.write_text("[http]\nport = 2000\n")
    monkeypatch.setattr("sollold.settings.load.candidates", lambda: [secret, own])
    # Simulates an ordinary user, also when the tests run as root.
    real_is_file, real_read = Path.is_file, read_file.read_file

    def is_file(path: Path) -> bool:
        if path == secret and closed == "folder":
            raise PermissionError(13, "Permission denied", str(path))
        return real_is_file(path)

    def read(path: Path) -> bytes:
        if path == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return real_read(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    monkeypatch.setattr(settings_load, "read_file", read)
    monkeypatch.setattr(os, "access", lambda path, mode: path != secret)
    assert load(environment={}, skip_unreadable=True).settings.http.port == 1000
    with pytest.raises(SettingsError, match=f"{secret}: can't be read: .*Permission denied"):
        load(environment={})


def test_only_the_named_keys_are_merged(tmp_path: Path) -> None:
    new = load(write(tmp_path, '[http]\nport = 1000\nwait_limit = 5\n[log]\nlevel = "debug"\n'), {}).settings
    result = merged(Settings(), new, ["http.wait_limit", "log.level"])
    assert differences(Settings(), result) == ["http.wait_limit", "log.level"]
    assert differences(result, new) == ["http.port"]


def test_permissions_in_an_existing_state_folder_are_restricted(tmp_path: Path) -> None:
    places = Places(tmp_path / "state", tmp_path / "cache")
    (places.state / "logs/d").mkdir(parents=True)
    (places.state / "models").mkdir()
    (places.state / "speed.json").write_text("{}")
    places.make()
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in places.state.iterdir()}
    assert modes == {"logs": 0o700, "models": 0o755, "speed.json": 0o600}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("placement.type_k", "Q8_0", "q8_0"),
        ("placement.policy", " Even", "even"),
        ("http.tls", "OFF", "off"),
    ],
)
def test_choices_are_case_insensitive(tmp_path: Path, key: str, text: str, value: str) -> None:
    section, name = key.split(".")
    for loaded in (
        load(write(tmp_path, f'[{section}]\n{name} = "{text}"\n'), {}),
        load(write(tmp_path, ""), {}, [(key, text, "--set")]),
    ):
        assert getattr(getattr(loaded.settings, section), name) == value


def test_a_pipe_is_read_and_times_out_without_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(read_file, "_PIPE_SECONDS", 0.05)
    with pytest.raises(SettingsError, match="it is a pipe to which nothing was written"):
        load(pipe, {})
    assert local_address({"SOLLOLD_CONFIG": str(pipe)}) is None
    monkeypatch.undo()
    text = "[http]\nport = 1000\n" + "# more\n" * 40_000
    with ThreadPoolExecutor() as pool:
        written = pool.submit(pipe.write_text, text)
        assert load(pipe, {}).settings.http.port == 1000
        assert written.result(10) == len(text)


def test_a_file_that_is_too_large_is_refused() -> None:
    with pytest.raises(SettingsError, match="larger than 16 MiB"):
        load(Path("/dev/zero"), {})


def test_relative_xdg_folders_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG specification requires: they would be other folders after a start elsewhere."""
    for name in ("STATE_DIRECTORY", "CACHE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "relative")
    monkeypatch.setenv("HOME", "/h")
    state, cache = Path("/h/.local/state/sollold"), Path("/h/.cache/sollold")
    assert places(Settings().node) == Places(state, cache)
    assert candidates()[0] == Path("/h/.config/sollold/sollold.toml")
    assert cache_home(os.environ, Path("/h")) == Path("/h/.cache")
