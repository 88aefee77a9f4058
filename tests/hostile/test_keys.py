"""Keys, and passwords in addresses: read once, kept apart, shown nowhere."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from rollout_models import build_model

from megatron_gpc.config import ServerConfig, SGLangConfig
from megatron_gpc.config.file import load
from megatron_gpc.engines.fleet import Fleet
from megatron_gpc.engines.keys import key_beside, new_key, read_key, shared_key, write_secret
from megatron_gpc.engines.starter import Starter, check_start
from megatron_gpc.errors import UserError

MINIMAL = "run_dir: runs/x\nmodel: {hf: start}\ndata: {prompts: p.jsonl, verifier: addition}\n"
SECRET = b"hunter2"


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (SECRET, 0o644, "mode 0644"),
        (SECRET, 0o620, "mode 0620"),
        (SECRET, 0o601, "mode 0601"),
        (b"", 0o600, "is empty"),
        (b" \n\n", 0o600, "is empty"),
        (SECRET + b"\nsecond", 0o600, "one line"),
        (SECRET + b"\rsecond", 0o600, "one line"),
        (SECRET + b" two", 0o600, "one line"),
        (SECRET + b"\0", 0o600, "one line"),
        (b"\xef\xbb\xbf" + SECRET, 0o600, "one line"),
        (SECRET + "ü".encode(), 0o600, "one line"),
        (SECRET + b"\xff\xfe", 0o600, "one line"),
        (SECRET * 1000, 0o600, "at most 4096 bytes"),
    ],
)
def test_a_key_file_that_cannot_be_is_refused_without_its_content(tmp_path, content, mode, says):
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(UserError) as refused:
        check_start(ServerConfig(api_key_file=file), SGLangConfig())
    message = str(refused.value)
    assert "api_key_file" in message and says in message and "hunter" not in message


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    begun = time.monotonic()
    for name in ("none", ".", "fifo", "a" * 300, "a\0b"):
        with pytest.raises(UserError, match="api_key_file: .*cannot be read"):
            read_key(tmp_path / name)
    assert time.monotonic() - begun < 5


def test_secrets_are_new_files_that_only_the_user_reads(tmp_path):
    aim, file = tmp_path / "aim", tmp_path / "logs" / "secret"
    aim.write_text("as it was")
    file.parent.mkdir()
    file.symlink_to(aim)
    write_secret(file, "x")
    assert aim.read_text() == "as it was" and not file.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o666)
    first = read_key(new_key(file))
    assert file.stat().st_mode & 0o777 == 0o600 and len(first) >= 32
    assert read_key(new_key(file)) != first


def test_an_embedded_server_of_a_run_has_a_key_of_its_own(tmp_path: Path):
    model = build_model(tmp_path / "model", seed=0)
    with Fleet(Starter(ServerConfig(), SGLangConfig(), model, tmp_path / "logs")) as fleet:
        assert fleet.await_started()
        (engine,) = fleet.engines
        stranger = httpx.post(f"{engine.url}/pause_generation", json={}, trust_env=False)
        assert stranger.status_code == 401
        assert fleet.run(engine.client.model_info())["weight_version"] == "default"
    assert (tmp_path / "logs" / "api_key").stat().st_mode & 0o777 == 0o600


def test_engines_of_serve_have_a_key_beside_their_addresses(tmp_path):
    """`serve` on several nodes makes one, a later one keeps it, and runs find it."""
    urls = tmp_path / "urls"

    def client_key() -> str | None:
        return Starter(ServerConfig(urls_file=urls), SGLangConfig(), tmp_path, tmp_path)._api_key()

    assert client_key() is None, "whoever started them made none"
    with ThreadPoolExecutor(8) as nodes:
        made = set(nodes.map(lambda _: read_key(shared_key(key_beside(urls))), range(8)))
    assert made == {client_key()} and os.listdir(tmp_path) == ["urls.key"]
    key_beside(urls).chmod(0o644)
    with pytest.raises(UserError, match="mode 0644"):
        shared_key(key_beside(urls))


def test_sglangs_own_file_of_arguments_is_kept(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("tp-size: 2\n")
    sglang = SGLangConfig(args={"config": str(own)})
    starter = Starter(ServerConfig(kind="sglang"), sglang, tmp_path, tmp_path / "logs")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "sglang_secrets.yaml").symlink_to(own)
    given = yaml.safe_load(starter._secrets().read_text())
    assert given == {"tp-size": 2, "api-key": read_key(tmp_path / "logs" / "api_key")}
    assert own.read_text() == "tp-size: 2\n"
    own.write_text("- 1\n")
    with pytest.raises(UserError, match="sglang.args.config"):
        starter._secrets()


def test_a_slurm_job_keeps_no_secret_of_its_environment():
    script = (Path(__file__).parents[2] / "slurm" / "common.sh").read_text()
    begin = script.index("kept_environment() {")
    kept = script[begin : script.index("\n}\n", begin) + 3] + "kept_environment"
    secret = {
        **{"PGPASSWORD": "hunter2", "WANDB_API_KEY": "hunter2", "SLURM_JWT": "hunter2"},
        **{
            "https_proxy": "http://me:hunter2@proxy:1",
            "OPTIONS": "-x --url=db://me:hunter2@host/a",
        },
        **{"MULTI": "a\nhttp://me:hun/hunter2@host", "git_credentials": "hunter2"},
    }
    plain = {"PATH": os.environ["PATH"], "PLAIN": "http://host/x", "LINES_OF": "a\nb"}
    found = subprocess.run(
        ["bash", "-c", kept], env=secret | plain, capture_output=True, text=True, check=True
    ).stdout
    assert "hunter2" not in found and "PLAIN=http://host/x\n" in found and "LINES_OF=a\nb" in found


@pytest.mark.parametrize(
    "given",
    [
        "rollout.server.urls=http://me:hunter2@host:1",
        "rollout.server.urls=[http://a, 'https://hunter2@host']",
        "rollout.server.urls=ftp://me:hunter2@host",
        "rollout.server.url=http://me:hunter2@host:1",
        "model.dtype=http://me:hunter2@host:1",
        "rollout.server.urls=me:hunter2@host:1",
        "rollout.server.urls=http://me:hun/hunter2@host:1",
        "sglang.environment.HTTPS_PROXY=http://me:hunter2@proxy",
        "log.sinks_arguments={mlflow: {tracking_uri: 'http://me:hunter2@host'}}",
        "sglang.args.api_key=hunter2",
        "sglang.args={api-key: hunter2}",
        "sglang.args.admin_api_key=hunter2",
    ],
)
def test_no_error_shows_a_password(tmp_path, given):
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(UserError) as refused:
        load(file, [given])
    assert "hunter2" not in str(refused.value)
