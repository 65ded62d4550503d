"""Settings: command line over variables over file, every flag in each of them, wrong ones told by place."""

from __future__ import annotations

from pathlib import Path

import pytest

from omniserve import cli
from omniserve.batch.limits import Quota
from omniserve.errors import ConfigError
from omniserve.server.auth import Keyring
from omniserve.server.flags import Settings, all_settings, read_settings
from omniserve.server.tiers import Clamp
from omniserve.types import SLO


def read(*flags: str, **variables: str) -> Settings:
    return read_settings(cli._parser().parse_args(["serve", *flags]), variables)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


def test_defaults_are_a_local_server_of_the_default_model() -> None:
    settings = read()
    assert (settings.server.host, settings.server.port, settings.engine.model) == (
        "127.0.0.1",
        8000,
        "smollm2-135m",
    )
    assert settings.server.state_dir is None
    assert read("other").engine.model == "other"
    assert read("--model", "other").engine.model == "other"


def test_the_command_line_goes_before_variables_and_those_before_the_file(file: Path) -> None:
    file.write_text(
        "port: 1\nmax-num-seqs: 2\ngrace: 3\nserved-model-name: [a, b]\nenable-prefix-caching: false\n"
    )
    settings = read(
        "--config", str(file), "--port", "11", OMNISERVE_PORT="21", OMNISERVE_MAX_NUM_SEQS="22",
    )  # fmt: skip
    assert (settings.server.port, settings.engine.max_num_seqs, settings.server.grace_s) == (11, 22, 3.0)
    assert settings.server.served_model_name == ("a", "b")
    assert settings.engine.enable_prefix_caching is False


def test_retention_and_reserve_come_from_flag_variable_and_file(file: Path) -> None:
    file.write_text("retention: 7200\napi-keys:\n- {key: k, quota: {retention-s: 3600}}\n")
    settings = read("--config", str(file), OMNISERVE_DISK_RESERVE="1000").server
    assert (settings.retention_s, settings.disk_reserve_bytes) == (7200, 1000)
    assert settings.api_keys[0].quota == Quota(retention_s=3600)
    settings = read("--config", str(file), "--retention", "86400", "--disk-reserve", "5").server
    assert (settings.retention_s, settings.disk_reserve_bytes) == (86400, 5)


def test_every_setting_can_come_from_everywhere(file: Path) -> None:
    shown = cli._parser().parse_args(["serve"])
    assert shown.run
    flags = {name for action in _serve_actions() for name in action.option_strings}
    for setting in all_settings():
        assert "--" + setting.name in flags, "a flag"
        assert setting.variable == "OMNISERVE_" + setting.name.replace("-", "_").upper()


def _serve_actions() -> list[object]:
    import argparse

    parser = cli._parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return list(commands.choices["serve"]._actions)


def test_flags_that_are_lists_take_several_values() -> None:
    settings = read("--api-key", "a", "--api-key", "c", "--served-model-name", "x", "y")
    assert [k.key for k in settings.server.api_keys] == ["a", "c"]
    assert settings.server.served_model_name == ("x", "y")
    assert [k.key for k in read(OMNISERVE_API_KEY="a b").server.api_keys] == ["a", "b"]


def test_a_model_after_a_key_is_no_key() -> None:
    settings = read("--api-key", "a", "other")
    assert [k.key for k in settings.server.api_keys] == ["a"]
    assert settings.engine.model == "other"


@pytest.mark.parametrize("name", ["OMNISERVE_API_KEY", "OMNISERVE_ADMIN_KEY"])
def test_a_secret_that_was_forgotten_opens_no_server(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: is empty"):
        read(**{name: ""})


@pytest.mark.parametrize("line", ["api-key: 1234567", "admin-key: 1234567", "api-keys: [{key: 1234567}]"])
def test_a_key_of_the_wrong_type_is_refused_and_not_shown(file: Path, line: str) -> None:
    file.write_text(line)
    with pytest.raises(ConfigError, match="quote") as caught:
        read("--config", str(file))
    assert "1234567" not in str(caught.value)


def test_keys_in_the_file_have_owners_tiers_and_clamps(file: Path) -> None:
    file.write_text(
        "api-key: plain\napi-keys:\n- {key: k, owner: team, tiers: [flex], tightest-slo: {ttft-s: 2}, "
        "lowest-priority: 0}\n"
    )
    plain, rich = read("--config", str(file)).server.api_keys
    assert plain.key == "plain"
    assert (rich.owner, rich.tiers, rich.clamp) == (
        "team",
        ("flex",),
        Clamp(tightest_ttft_s=2, lowest_priority=0),
    )


def test_keys_in_the_file_have_quotas_which_are_their_owners(file: Path) -> None:
    quota = "quota: {max-bytes: 1000, max-open-lines: 5}"
    file.write_text(
        f"api-keys:\n- {{key: k, owner: team, {quota}}}\n- {{key: l, owner: team}}\n- {{key: m}}\n"
    )
    keyring = Keyring(read("--config", str(file)).server)
    assert keyring.quota("team") == Quota(max_bytes=1000, max_open_lines=5)
    assert keyring.quota(keyring.client("Bearer m").owner) == Quota()
    file.write_text(
        f"api-keys:\n- {{key: k, owner: team, {quota}}}\n- {{key: l, owner: team, quota: {{}}}}\n"
    )
    with pytest.raises(ConfigError, match="owner 'team' have different quotas"):
        read("--config", str(file))


def test_targets_and_their_clamp_make_the_class(file: Path) -> None:
    settings = read(
        "--slo-ttft-s",
        "1",
        "--slo-tpot-s",
        "0.1",
        "--slo-loosest-ttft-s",
        "9",
        OMNISERVE_SLO_LOOSEST_TPOT_S="1",
    )
    chat, batch = settings.engine.classes
    assert (chat.slo, chat.tightest, chat.loosest) == (SLO(1.0, 0.1), None, SLO(9.0, 1.0))
    assert batch.slo is None
    for wrong in (["--slo-ttft-s", "1"], ["--slo-tightest-ttft-s", "1", "--slo-tightest-tpot-s", "1"]):
        with pytest.raises(ConfigError, match="slo-"):
            read(*wrong)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot: 1", "prot"),
        ("port: many", "port"),
        ("port: true", "port"),
        ("port: 1.5", "port"),
        ("enable-prefix-caching: perhaps", "enable-prefix-caching"),
        ("host-offload: sometimes", "host-offload"),
        ("- port", "map names"),
        ("port: [", "cannot be read"),
        ("api-keys: [{owner: x}]", "api-keys"),
        ("api-keys: [{key: x, tiers: [gold]}]", "gold"),
        ("api-keys: [{key: x, quota: {max-lines: 1}}]", "max-open-lines"),
        ("api-keys: [{key: x, quota: {max-files: -1}}]", "max_files"),
        ("api-keys: [{key: }]", "api_key"),
        ("api-keys: {key: x}", "must be a list"),
        ("api-keys: [{key: x, tiers: flex}]", "tiers must be a list"),
        ("api-keys: [{key: x, owner: 5}]", "owner"),
        ("api-key: ", "not empty"),
        ("queue-timeout: .inf", "queue_timeout_s"),
        ("max-num-seqs: 0", "max_num_seqs"),
        ("engine-hang-timeout: 1", "engine_hang_timeout_s"),
        ("retention: 60", "retention_s: must be whole seconds from 3600"),
        ("disk-reserve: -1", "disk_reserve_bytes"),
        ("api-keys: [{key: x, quota: {retention-s: 60}}]", "quota: retention_s: must be whole seconds"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(file: Path, text: str, named: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        read("--config", str(file))


def test_a_queue_timeout_can_be_turned_off() -> None:
    assert read().server.best_effort_queue_timeout_s == 600
    assert read("--best-effort-queue-timeout", "0").server.best_effort_queue_timeout_s == 0


def test_wrong_variables_are_named_and_those_of_kubernetes_are_none_of_ours() -> None:
    with pytest.raises(ConfigError, match="OMNISERVE_MAX_REQUESTS"):
        read(OMNISERVE_MAX_REQUESTS="many")
    settings = read(OMNISERVE_PORT="tcp://10.0.0.1:8000", OMNISERVE_SERVICE_HOST="10.0.0.1")
    assert settings.server.port == 8000
