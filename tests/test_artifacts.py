"""Artifacts in a folder and in S3 (moto's server, real boto3 over HTTP): whole or absent, apart, no secrets told."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.request import Request, urlopen

import boto3
import optuna
import pytest
from moto.server import ThreadedMotoServer
from optuna.artifacts import download_artifact, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound

from camri_tune.artifacts import ArtifactStore, FolderStore, S3Store, describe, open_artifacts
from camri_tune.errors import InputError

KEY, SECRET, TOKEN = "AKQ0WX1YZ2", "qXz7/wVk9+Zj4@Yy8", "tQ5kZn6"
HOSTILE = ["../x", "/etc/x", "a/b", "a\0b", "", ".", "..", "x\n", "ä", "a" * 300, ".x.partial", "x.partial"]


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials from the environment alone, and nothing of this machine's own."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a server that has one empty bucket."""
    _ask_moto(moto_url, "reset")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_url)
    client = boto3.session.Session().client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    return client


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """An empty store of either kind."""
    if request.param == "folder":
        return open_artifacts(str(tmp_path / "artifacts"))
    request.getfixturevalue("s3")
    return open_artifacts("s3://bucket/some/prefix")


def _ask_moto(url: str, what: str, data: bytes = b"") -> None:
    with urlopen(Request(f"{url}/moto-api/{what}", data=data, headers={"Content-Type": "text/plain"})):
        pass


def _keys(client: Any) -> list[str]:
    return sorted(found["Key"] for found in client.list_objects_v2(Bucket="bucket").get("Contents", []))


def _read(store: ArtifactStore, artifact_id: str) -> bytes:
    with store.open_reader(artifact_id) as file:
        return file.read()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class _Broken(io.RawIOBase):
    """A file on a disk that fails after the first megabyte."""

    left = 2**20

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.left == 0:
            raise OSError(errno.EIO, "the source broke")
        count = min(self.left, len(buffer))
        buffer[:count] = b"x" * count
        self.left -= count
        return count


# Both kinds


def test_what_is_written_is_read_until_it_is_removed(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactNotFound):
        store.open_reader("model")
    for content in (b"", b"first", b"second" * 500_000):
        store.write("model", io.BytesIO(content))
        assert _read(store, "model") == content
    with store.open_reader("model") as file:
        assert file.seekable()
        file.seek(6)
        assert file.read(6) == b"second"
    store.remove("model")
    with pytest.raises(ArtifactNotFound):
        store.open_reader("model")
    store.remove("model")


def test_a_write_leaves_its_source_open(store: ArtifactStore) -> None:
    source = io.BytesIO(b"0123456789")
    source.seek(4)
    store.write("part", source)
    assert _read(store, "part") == b"456789"
    source.seek(0)


def test_a_source_that_breaks_off_stores_nothing_and_keeps_what_was_there(store: ArtifactStore) -> None:
    store.write("old", io.BytesIO(b"old"))
    for name in ("old", "new"):
        with pytest.raises(OSError, match="the source broke"):
            store.write(name, cast(BinaryIO, _Broken()))
    assert _read(store, "old") == b"old"
    with pytest.raises(ArtifactNotFound):
        store.open_reader("new")
    if isinstance(store, FolderStore):
        assert _names(store.folder) == ["old"]


def test_optuna_takes_it_as_an_artifact_store(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"weights")
    trial = optuna.create_study().ask()
    made = upload_artifact(artifact_store=store, file_path=str(tmp_path / "in"), study_or_trial=trial)
    download_artifact(artifact_store=open_artifacts(store.url), file_path=str(tmp_path / "out"), artifact_id=made)
    assert (tmp_path / "out").read_bytes() == b"weights"


@pytest.mark.parametrize("artifact_id", HOSTILE)
def test_a_hostile_id_reaches_nothing(store: ArtifactStore, artifact_id: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not ours")
    store.write("a", io.BytesIO(b"ours"))
    with pytest.raises(ValueError, match="is not one plain name"):
        store.write(artifact_id, io.BytesIO(b"evil"))
    with pytest.raises(ArtifactNotFound) as raised:
        store.open_reader(artifact_id)
    assert "\n" not in str(raised.value)
    with pytest.raises(ArtifactNotFound):
        store.remove(artifact_id)
    assert (tmp_path / "x").read_bytes() == b"not ours"
    if isinstance(store, FolderStore):
        assert _names(store.folder) == ["a"]
        assert _names(tmp_path) == ["artifacts", "x"]


def test_a_study_is_told_from_others_by_its_mark(store: ArtifactStore, tmp_path: Path) -> None:
    assert not store.belongs_to("1f")
    with ThreadPoolExecutor(8) as pool:  # as many workers at the start of a run
        list(pool.map(store.claim_for, ["1f", "2e"] * 8))
    elsewhere = open_artifacts(store.url)
    assert elsewhere.belongs_to("1f")
    assert elsewhere.belongs_to("2e")
    assert not elsewhere.belongs_to("3d")
    store.write(".study-3d", io.BytesIO(b"another"))
    assert not elsewhere.belongs_to("3d")


def test_a_check_leaves_nothing(store: ArtifactStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.check(), range(4)))
    assert store.sweep(0) == 0
    if isinstance(store, FolderStore):
        assert _names(store.folder) == []


# Names of stores


def test_a_folder_is_named_by_path_or_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    urls = [
        "a b@c",
        "./a b@c/",
        f"{tmp_path}/a b@c",
        f"{tmp_path}/x/../a b@c",
        f"file://{tmp_path}/a%20b@c",
        f"FILE://{tmp_path}/a b@c",
    ]
    for url in urls:
        store = open_artifacts(url)
        assert isinstance(store, FolderStore)
        assert store.url == str(tmp_path / "a b@c")
        assert open_artifacts(store.url).url == store.url
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gs://x", "--artifacts 'gs://x' is of an unknown kind; give a folder, file:///folder or s3://bucket/prefix"),
        ("https://u:" + SECRET + "@h/x?X-Amz-Signature=" + SECRET, "'https://***?***' is of an unknown kind"),
        ("s3:bucket/x", "'s3:bucket/x' is of an unknown kind"),
        (f"s3:{KEY}:{SECRET}@bucket/x", "is of an unknown kind"),
        (f"s3:/{KEY}:{SECRET}@bucket/x", "is of an unknown kind"),
        ("s3://", "has no bucket's name"),
        ("s3:///x", "has no bucket's name"),
        ("s3://b\n/x", "has no bucket's name"),
        ("s3://bucket/x\x1b[2J", "characters that none takes"),
        ("s3://bucket/x?y=" + SECRET, "has a login or a query"),
        ("s3://bucket/x#y", "has a login or a query"),
        (f"s3://{KEY}:{SECRET}@bucket/x", "has a login or a query"),
        (f"s3://{KEY}:{SECRET}/bucket/x", "has a login or a query"),
        (f"S3://{KEY}@bucket", "has a login or a query"),
        ("file:relative", "is not a file URL of this machine"),
        ("file://host/x", "is not a file URL of this machine"),
        (f"file://u:{SECRET}@host/x", "is not a file URL of this machine"),
        ("file:///x?y", "is not a file URL of this machine"),
        ("file:///x%00", "is not a folder"),
        ("", "is not a folder"),
        ("a\0b", "is not a folder"),
        ("a\ud800b", "is not a folder"),
        ("taken", "--artifacts 'taken' is not a folder; give a folder, file:///folder or s3://bucket/prefix"),
    ],
)
def test_other_names_are_refused_in_one_line(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        open_artifacts(url)
    _assert_one_line_without_secrets(raised.value)
    assert _names(tmp_path) == ["taken"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("runs/a@b:c", "runs/a@b:c"),
        ("file:///a:b/c@d", "file:///a:b/c@d"),
        ("s3://bucket/a@b:c", "s3://bucket/a@b:c"),
        ("s3://k:s@bucket/x", "s3://***"),
        ("s3://k:s/t@u@bucket/x", "s3://***"),
        ("s3://k:s/bucket/x", "s3://***"),
        ("s3://k:s/bucket/x?t", "s3://***?***"),
        ("s3://bucket/x?k=s#t", "s3://bucket/x?***"),
        ("s3:k:s@bucket", "s3:***"),
    ],
)
def test_a_url_is_described_without_a_login_or_a_query(url: str, shown: str) -> None:
    assert describe(url) == shown


def _assert_one_line_without_secrets(error: BaseException) -> None:
    assert "\n" not in str(error)
    shown = str(error) + repr(error) + "".join(traceback.format_exception(error))
    for secret in (KEY, *re.split("[/+@]", SECRET), TOKEN):
        assert secret not in shown


# Folders


def test_a_reader_never_sees_a_part_while_processes_write_the_same_name(tmp_path: Path) -> None:
    size = 300_000
    code = f"""
import io, sys
from pathlib import Path
from camri_tune.artifacts import FolderStore
store = FolderStore(Path(sys.argv[1]))
for _ in range(150):
    store.write("same", io.BytesIO(sys.argv[2].encode() * {size}))
"""
    folder = tmp_path / "artifacts"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(folder), letter]) for letter in "abc"]
    seen: set[bytes] = set()
    store = FolderStore(folder)
    while any(writer.poll() is None for writer in writers):
        try:
            content = _read(store, "same")
        except ArtifactNotFound:  # not yet
            assert not seen
            continue
        assert len(content) == size
        assert len(set(content)) == 1
        seen.add(content[:1])
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert seen
    assert _names(folder) == ["same"]


def test_a_killed_writer_leaves_only_what_a_sweep_removes(tmp_path: Path) -> None:
    code = """
import io, sys, time
from pathlib import Path
from camri_tune.artifacts import FolderStore
class Slow(io.RawIOBase):
    def readable(self):
        return True
    def readinto(self, buffer):
        time.sleep(0.01)
        buffer[:] = bytes(len(buffer))
        return len(buffer)
FolderStore(Path(sys.argv[1])).write("model", Slow())
"""
    folder = tmp_path / "artifacts"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)]) as writer:
        while not (folder.exists() and any(path.stat().st_size for path in folder.iterdir())):
            assert writer.poll() is None
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
    store = FolderStore(folder)
    with pytest.raises(ArtifactNotFound):
        store.open_reader("model")
    (partial,) = folder.iterdir()
    assert re.fullmatch(r"\.model\.[0-9a-f]{32}\.partial", partial.name)
    with pytest.raises(ArtifactNotFound):
        store.open_reader(partial.name)

    store.claim_for("1f")
    for name in ("a", "partial", ".partial", ".a.partial", "a.partial"):  # whatever they are, they are not ours
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    assert store.sweep() == 0
    hour_ago = time.time() - 3600
    os.utime(partial, (hour_ago, hour_ago))
    assert store.sweep(7200) == 0
    assert store.sweep(1800) == 1
    assert not partial.exists()
    assert _names(folder) == [".a.partial", ".partial", ".study-1f", "a", "a.partial", "partial"]
    assert FolderStore(tmp_path / "never made").sweep() == 0


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(small_disk: Path) -> None:
    store = FolderStore(small_disk)
    store.check()
    store.write("old", io.BytesIO(b"old"))
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space left on device") as raised:
            store.write(name, io.BytesIO(bytes(2**21)))
        assert raised.value.errno == errno.ENOSPC
        assert _names(small_disk) == ["old"]
    assert _read(store, "old") == b"old"

    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(InputError, match=f"--artifacts '{small_disk}' cannot be used: No space left on device;"):
        store.check()
    with pytest.raises(OSError, match="No space left on device"):
        store.claim_for("1f")
    assert not store.belongs_to("1f")
    assert _names(small_disk) == ["filler", "old"]
    (small_disk / "filler").unlink()
    store.claim_for("1f")
    assert store.belongs_to("1f")


def test_links_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"not ours")
    folder = tmp_path / "artifacts"
    folder.mkdir()
    for name in ("read", "written", "removed"):
        (folder / name).symlink_to(secret)
    (folder / "dangling").symlink_to(tmp_path / "new")
    store = FolderStore(folder)
    for name in ("read", "dangling"):
        with pytest.raises(ArtifactNotFound):
            store.open_reader(name)
    for name in ("written", "dangling"):
        store.write(name, io.BytesIO(b"ours"))
        assert not (folder / name).is_symlink()
        assert _read(store, name) == b"ours"
    store.remove("removed")
    assert secret.read_bytes() == b"not ours"
    assert _names(tmp_path) == ["artifacts", "secret"]

    (tmp_path / "link").symlink_to(folder)  # the store itself may be one: it is the user who names it
    assert _read(open_artifacts(str(tmp_path / "link")), "written") == b"ours"


def test_files_are_open_to_whom_the_umask_says(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    before = os.umask(0o027)
    try:
        store.write("model", io.BytesIO(b"weights"))
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_cannot_be_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in [
        ("file/x", "Not a directory"),
        ("a" * 300, "File name too long"),
        ("loop/x", "Too many levels"),
    ]:
        with pytest.raises(InputError, match=f"cannot be used: {reason}") as raised:
            open_artifacts(str(tmp_path / name)).check()
        assert "\n" not in str(raised.value)
    (tmp_path / "model").mkdir()
    with pytest.raises(IsADirectoryError):
        FolderStore(tmp_path).write("model", io.BytesIO(b"weights"))
    assert _names(tmp_path) == ["file", "loop", "model"]


# S3


def test_every_key_lies_under_the_prefix(s3: Any) -> None:
    for key in ("model", "some/model", "some/prefix", "some/prefixmodel"):
        s3.put_object(Bucket="bucket", Key=key, Body=b"another's")
    before = _keys(s3)
    store = open_artifacts("s3://bucket//some/prefix/")
    assert store.url == "s3://bucket/some/prefix"
    store.remove("model")
    store.check()
    assert not store.belongs_to("1f")
    assert _keys(s3) == before
    store.write("model", io.BytesIO(b"ours"))
    store.claim_for("1f")
    assert sorted({*_keys(s3)} - {*before}) == ["some/prefix/.study-1f", "some/prefix/model"]
    store.remove("model")
    store.remove(".study-1f")
    assert _keys(s3) == before


def test_a_bucket_without_a_prefix(s3: Any) -> None:
    for url in ("s3://bucket", "s3://bucket/"):
        store = open_artifacts(url)
        assert store.url == "s3://bucket"
        store.write("model", io.BytesIO(b"ours"))
    assert _keys(s3) == ["model"]


def test_an_object_of_many_parts(s3: Any) -> None:
    store = open_artifacts("s3://bucket/p")
    content = os.urandom(2**20) * 9
    store.write("model", io.BytesIO(content))
    assert _read(store, "model") == content
    assert s3.head_object(Bucket="bucket", Key="p/model")["ETag"].endswith('-2"')


def test_a_bucket_that_does_not_exist(s3: Any) -> None:
    store = open_artifacts("s3://nowhere/p")
    said = re.escape("--artifacts 's3://nowhere/p' cannot be used: there is no such bucket; ")
    with pytest.raises(InputError, match=said) as raised:
        store.check()
    _assert_one_line_without_secrets(raised.value)
    # Later on, too, it is not taken for an artifact that is missing.
    for fails in (store.open_reader, store.remove, store.claim_for, store.belongs_to):
        with pytest.raises(OSError, match="there is no such bucket: 's3://nowhere/p'"):
            fails("1f")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "nothing answers at its endpoint 127.0.0.1:9;"),
        ({"AWS_ENDPOINT_URL_S3": f"http://{KEY}:{TOKEN}@127.0.0.1:9"}, "nothing answers at its endpoint;"),
        ({"AWS_ENDPOINT_URL_S3": f"http://{KEY}:{TOKEN}/x@:9/"}, "boto3 gave up with 'EndpointResolutionError'"),
        ({"AWS_ENDPOINT_URL_S3": f"{TOKEN}:9"}, "AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is not like https://host"),
        ({"HTTP_PROXY": f"http://{KEY}:{TOKEN}@127.0.0.1:9"}, "boto3 gave up with 'ProxyConnectionError'"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials are where boto3 looks"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "boto3 gave up with 'PartialCredentialsError'"),
        ({"AWS_PROFILE": TOKEN}, "boto3 gave up with 'ProfileNotFound'"),
        # boto3's own text quotes the token, which a line break (so easily in a secret's file) makes an illegal header.
        ({"AWS_SESSION_TOKEN": f"{TOKEN}\n"}, "boto3 gave up with 'HTTPClientError'"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_trouble_with_the_environment_is_one_line_without_secrets(
    s3: Any, environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(reason)) as raised:
        open_artifacts("s3://bucket/p").check()
    assert str(raised.value).startswith("--artifacts 's3://bucket/p' cannot be ")
    _assert_one_line_without_secrets(raised.value)
    assert _keys(s3) == []


def test_credentials_that_the_server_does_not_know(s3: Any, moto_url: str) -> None:
    store = open_artifacts("s3://bucket/p")
    _ask_moto(moto_url, "reset-auth", b"0")
    try:
        with pytest.raises(InputError, match="cannot be used: the access key is not known there;") as raised:
            store.check()
        with pytest.raises(OSError, match="the access key is not known there") as later:
            store.open_reader("model")
    finally:
        _ask_moto(moto_url, "reset-auth", b"Infinity")
    _assert_one_line_without_secrets(raised.value)
    _assert_one_line_without_secrets(later.value)


@contextmanager
def _answering(status: int, body: bytes, promised: int) -> Iterator[str]:
    """A server that promises so many bytes, sends `body` and hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing on standard error."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


DENIED = b"<Error><Code>AccessDenied</Code><Message>no " + SECRET.encode() + b"</Message></Error>"


@pytest.mark.parametrize(
    ("status", "body", "promised", "reason"),
    [
        (200, b"half of the model", 10_000, "boto3 gave up with 'ResponseStreamingError'"),
        (403, DENIED, len(DENIED), "access is denied (it takes s3:GetObject, "),
        (404, b"no S3 at all", 12, "boto3 gave up with '404'"),
    ],
    ids=["cut short", "denied", "no S3"],
)
def test_trouble_while_reading_is_no_missing_artifact(
    status: int, body: bytes, promised: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _answering(status, body, promised) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        store = open_artifacts("s3://bucket/p")
        with pytest.raises(OSError, match=re.escape(reason)) as raised:
            store.open_reader("model")
    _assert_one_line_without_secrets(raised.value)


def test_without_boto3_a_bucket_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InputError) as raised:
        open_artifacts("s3://bucket/p")
    said = "--artifacts 's3://bucket/p' needs boto3, which is not installed: pip install 'camri-tune[s3]'"
    assert str(raised.value) == said


def test_without_boto3_folders_are_as_ever(tmp_path: Path) -> None:
    code = """
import io, sys
sys.modules |= dict.fromkeys(["boto3", "botocore", "s3transfer"])
from camri_tune.artifacts import open_artifacts
from camri_tune.errors import InputError
store = open_artifacts(sys.argv[1])
store.check()
store.claim_for("1f")
print(store.belongs_to("1f"))
try:
    open_artifacts("s3://bucket/p")
except InputError as error:
    print(error)
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "True",
        "--artifacts 's3://bucket/p' needs boto3, which is not installed: pip install 'camri-tune[s3]'",
    ]


def test_a_store_of_each_kind_says_which_it_is(s3: Any, tmp_path: Path) -> None:
    assert isinstance(open_artifacts("S3://bucket/p"), S3Store)
    assert isinstance(open_artifacts(str(tmp_path)), FolderStore)
