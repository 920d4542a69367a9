"""Where the files of a study's trials lie: a folder, which may be on a shared file system, or a prefix in an S3 bucket.

Two kinds of trouble are told apart: optuna.artifacts.exceptions.ArtifactNotFound says that a store which answers has no
such artifact; OSError says that the store itself is at fault (disk full, network, rights) and may be well again later.
"""

import errno
import io
import os
import re
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from camri_tune.errors import InputError

_DAY = 24 * 60 * 60
# Ids are read from a database that others write to. One plain name can neither climb out of a folder nor pass for a
# file that is still being written; the latter's name, longer by 42 characters, must fit a file system, too.
_PLAIN = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,200}(?<!\.partial)")
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.partial")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/*)(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
_WAY_OUT = "give a folder, file:///folder or s3://bucket/prefix"
_REASONS = {  # what S3 and botocore call it: what it means
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "access is denied (it takes s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket)",
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key is not the access key's",
    "ExpiredToken": "the credentials have expired",
    "NoCredentialsError": "no credentials are where boto3 looks (AWS_ACCESS_KEY_ID and others, a profile, a role)",
    "EndpointConnectionError": "nothing answers at its endpoint",
    "ConnectTimeoutError": "nothing answers at its endpoint",
}


class ArtifactStore(ABC):
    """A place of artifacts, for many processes at once; also what Optuna's functions take as an artifact store.

    An id is one plain name (Optuna's are UUIDs): other ids raise an error that is both ArtifactNotFound and ValueError.
    `url` names the store for messages and for other processes, and has no secret in it.
    """

    url: str

    @abstractmethod
    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Store what is left to read of `content_body`: whole or not at all. Raises OSError."""

    @abstractmethod
    def open_reader(self, artifact_id: str) -> BinaryIO:
        """An artifact's bytes, which can be sought in. Raises ArtifactNotFound, or OSError."""

    @abstractmethod
    def remove(self, artifact_id: str) -> None:
        """Remove an artifact; one that is not there is no error. Raises OSError."""

    def sweep(self, older_than_seconds: float = _DAY) -> int:
        """Remove what killed processes left half written, if nobody can still be writing it; how many."""
        return 0

    def check(self) -> None:
        """Try, within seconds, to write and to remove. Raises InputError: one line with the store and the reason."""
        try:
            self.write(".probe", io.BytesIO(b"camri-tune"))  # not empty, for which a full disk may have room
            self.remove(".probe")
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"--artifacts {self.url!r} cannot be used: {reason}; mend that, or {_WAY_OUT}") from None

    def claim_for(self, study_id: str) -> None:
        """Leave a mark by which other machines see that a study's files lie here. Raises OSError.

        One mark a study, because several may share a store, and always the same, because many processes may leave it.
        """
        self.write(f".study-{study_id}", io.BytesIO(study_id.encode()))

    def belongs_to(self, study_id: str) -> bool:
        """Whether `claim_for` was called here for that study, on whatever machine. Raises OSError."""
        try:
            with self.open_reader(f".study-{study_id}") as mark:
                return mark.read() == study_id.encode()
        except ArtifactNotFound:
            return False


class FolderStore(FileSystemArtifactStore, ArtifactStore):
    """Artifacts as files of one folder, which the first write makes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.url = str(folder)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write under a name of this call's own, then rename: under a final name there is only ever a whole file."""
        path = self.folder / _plain(artifact_id)
        partial = self.folder / f".{path.name}.{uuid.uuid4().hex}.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            # Not by tempfile, whose files are closed to other users: their workers may share the folder.
            with partial.open("xb") as file:
                shutil.copyfileobj(content_body, file)
                file.flush()
                os.fsync(file.fileno())  # a network file system may say "disk full" as late as here
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Open one of our files. A link is none: the dashboard serves artifacts, and nothing that lies elsewhere."""
        path = self.folder / _plain(artifact_id)
        try:
            return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                raise ArtifactNotFound(f"{path} is not there, or is a link") from None
            raise

    def remove(self, artifact_id: str) -> None:
        """Remove one of our files, if it is there."""
        (self.folder / _plain(artifact_id)).unlink(missing_ok=True)

    def sweep(self, older_than_seconds: float = _DAY) -> int:
        """Remove partial files to which nothing was added for so long; how many. Raises OSError."""
        count = 0
        for path in self.folder.glob(".*.partial"):
            with suppress(FileNotFoundError):  # finished by now, or swept by another process
                if _PARTIAL.fullmatch(path.name) and time.time() - path.lstat().st_mtime > older_than_seconds:
                    path.unlink()
                    count += 1
        return count


class S3Store(Boto3ArtifactStore, ArtifactStore):
    """Artifacts as objects under a prefix of a bucket. Credentials, region and endpoint are boto3's to find.

    S3 shows an object whole or not at all, and one passes through memory whole: a source or a connection that breaks
    off does so before anything is stored or handed out. What a killed upload of more than 8 MB leaves is invisible; a
    lifecycle rule of the bucket (AbortIncompleteMultipartUpload) removes it. Raises OSError, ValueError, ImportError.
    """

    def __init__(self, bucket: str, prefix: str, *, attempts: int = 5, seconds: float = 60) -> None:
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._prefix = prefix
        import boto3  # noqa: PLC0415  (only those who use S3 have it)
        from botocore.config import Config  # noqa: PLC0415

        retries = {"mode": "standard", "total_max_attempts": attempts}
        with self._readable():
            session = boto3.session.Session()  # boto's default one may not be used by several threads
            config = Config(retries=retries, connect_timeout=min(seconds, 10), read_timeout=seconds)
            super().__init__(bucket, session.client("s3", config=config))

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Put one object. Raises OSError."""
        with self._readable():
            super().write(self._key(artifact_id), content_body)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Get one object. Raises ArtifactNotFound, or OSError, also for a missing bucket (not found, to Optuna)."""
        key = self._key(artifact_id)
        # Not `with body`, which gives another object, without a check of length and checksum and with other errors.
        with self._readable(), closing(self.client.get_object(Bucket=self.bucket, Key=key)["Body"]) as body:
            return io.BytesIO(body.read())

    def remove(self, artifact_id: str) -> None:
        """Delete one object, if it is there. Raises OSError."""
        with self._readable():
            super().remove(self._key(artifact_id))

    def check(self) -> None:
        """The same without the patience that a save deserves. Raises InputError."""
        ArtifactStore.check(S3Store(self.bucket, self._prefix, attempts=2, seconds=5))

    def _key(self, artifact_id: str) -> str:
        return f"{self._prefix}/{_plain(artifact_id)}".lstrip("/")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Make boto's errors ours. Nothing of their texts is kept: they may quote tokens and passwords of endpoints."""
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            name = type(error).__name__
            if isinstance(error, ClientError):
                name = str(error.response.get("Error", {}).get("Code"))[:60]
            if name == "NoSuchKey":
                raise ArtifactNotFound(f"{self.url} has no such object") from None
            reason = _REASONS.get(name, f"boto3 gave up with {name!r}")
            endpoint = str(getattr(error, "kwargs", {}).get("endpoint_url"))
            if name in ("EndpointConnectionError", "ConnectTimeoutError") and "@" not in endpoint:
                reason += f" {urlsplit(endpoint).netloc}"
            raise OSError(errno.EIO, reason, self.url) from None


def open_artifacts(url: str) -> ArtifactStore:
    """The store at `url`: a folder, file:///folder or s3://bucket/prefix. Nothing is asked or made yet: see `check`.

    Raises InputError, one line without any secret that the URL may have.
    """
    shown = f"--artifacts {describe(url)!r}"
    matched = _URL.fullmatch(url)
    kind, slashes, rest = matched.groups() if matched else ("", "", url)
    if kind.lower() == "s3" and slashes.startswith("//"):
        return _open_bucket(slashes[2:] + rest, shown)
    if kind.lower() == "file":
        if slashes != "///" or set("?#") & set(rest):
            raise InputError(f"{shown} is not a file URL of this machine; give file:///folder, or the folder itself")
        rest = "/" + unquote(rest)
    elif kind:
        raise InputError(f"{shown} is of an unknown kind; {_WAY_OUT} (./NAME where a folder's name is like this)")
    try:
        folder = Path(os.path.realpath(rest)) if rest else None
    except ValueError:  # NUL, or what is no Unicode
        folder = None
    if folder is None or (os.path.exists(folder) and not os.path.isdir(folder)):
        raise InputError(f"{shown} is not a folder; {_WAY_OUT}")
    return FolderStore(folder)


def _open_bucket(rest: str, shown: str) -> S3Store:
    bucket, _, prefix = rest.partition("/")
    if set("@:") & set(bucket) or set("?#") & set(rest):
        raise InputError(
            f"{shown} has a login or a query; give s3://bucket/prefix, and credentials where boto3 looks for them "
            f"(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, a role)"
        )
    if not _BUCKET.fullmatch(bucket) or not prefix.isprintable():
        raise InputError(f"{shown} has no bucket's name, or characters that none takes; give s3://bucket/prefix")
    try:
        return S3Store(bucket, "/".join(filter(None, prefix.split("/"))))
    except ImportError:
        raise InputError(f"{shown} needs boto3, which is not installed: pip install 'camri-tune[s3]'") from None
    except OSError as error:
        raise InputError(f"{shown} cannot be opened: {error.strerror}; set up boto3's environment") from None
    except ValueError:
        rule = "AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is not like https://host:port"
        raise InputError(f"{shown} cannot be opened: {rule}; mend it in the environment") from None


def describe(url: str) -> str:
    """The URL as messages may show it: nothing of a login or a query."""
    matched = _URL.fullmatch(url)
    if matched is None or url.lower().startswith("file:///"):
        return url[:300]
    kind, slashes, rest = matched.groups()
    rest, *query = re.split("[?#]", rest, maxsplit=1)
    if set("@:") & set(rest.partition("/")[0]):
        rest = "***"  # all of it: a secret may have slashes and @ in it, so that nobody knows where it ends
    return f"{kind}:{slashes}{rest}{'?***' if query else ''}"[:300]


def _plain(artifact_id: str) -> str:
    if not _PLAIN.fullmatch(artifact_id):
        raise _NoPlainNameError(f"artifact id {artifact_id[:100]!r} is not one plain name: no artifact can have it")
    return artifact_id


class _NoPlainNameError(ArtifactNotFound, ValueError):
    """Both: readers go on as with any artifact that is missing, and writers see that the id is at fault."""
